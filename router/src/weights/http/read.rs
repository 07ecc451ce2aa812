//! Reading files over HTTP, whole or by byte range, and trying again.

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, CONTENT_RANGE, HeaderMap, RANGE, RETRY_AFTER};
use reqwest::{Response, StatusCode};

use super::{Hub, Repository, SourceError};

/// Attempts to read what is needed before any weights can be: the manifest and the headers.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// From a server that ignores ranges no more than this is read in vain.
const MAX_SKIP: u64 = 64 << 20;

impl Hub {
    /// Exactly these bytes of a file.
    pub(super) async fn range(&self, file: &str, range: Range<u64>) -> Result<Bytes, SourceError> {
        let response = self.get(file, Some(&range)).await?;
        let length = range.end - range.start;
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let said = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let start = said.and_then(|said| said.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok());
                if start != Some(range.start) {
                    return Err(SourceError::Failed(format!(
                        "it sent {said:?} when asked for bytes from {}",
                        range.start
                    )));
                }
                0
            }
            // The server ignores ranges and sends everything.
            _ if range.start <= MAX_SKIP => range.start,
            _ => return Err(SourceError::Useless("the server ignores byte ranges".into())),
        };
        take(response, skip, Some(length), length).await
    }

    pub(super) async fn get(&self, file: &str, range: Option<&Range<u64>>) -> Result<Response, SourceError> {
        let Repository { repo, revision } = &self.repository;
        let url = format!("{}/{repo}/resolve/{revision}/{file}", self.endpoint);
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token.clone());
        }
        if let Some(range) = range {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        let response = request.send().await.map_err(|error| SourceError::Failed(reason_of(&error)))?;
        let status = response.status();
        match status {
            StatusCode::NOT_FOUND => Err(SourceError::NotHere),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Err(match retry_after(response.headers()) {
                    Some(retry_after) => SourceError::Busy { retry_after },
                    None => SourceError::Failed(format!("the server said {status}")),
                })
            }
            _ if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(SourceError::Useless(format!("the server said {status}: set HF_TOKEN to a token that may read it")))
            }
            _ if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
                Err(SourceError::Failed(format!("the server said {status}")))
            }
            _ => Err(SourceError::Useless(format!("the server said {status}"))),
        }
    }
}

/// Reads a body: leaves `skip` bytes out, then takes `length`, or all there is, but never more than `limit`.
pub(super) async fn take(
    mut response: Response,
    skip: u64,
    length: Option<u64>,
    limit: u64,
) -> Result<Bytes, SourceError> {
    let mut left_out = 0;
    let mut taken = BytesMut::new();
    while let Some(mut part) = response.chunk().await.map_err(|error| SourceError::Failed(reason_of(&error)))? {
        let skipped = (skip - left_out).min(part.len() as u64);
        left_out += skipped;
        part = part.slice(skipped as usize..);
        let wanted = length.map_or(u64::MAX, |length| length - taken.len() as u64);
        part.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        taken.extend_from_slice(&part);
        if taken.len() as u64 > limit {
            return Err(SourceError::Useless(format!("the file has more than {limit} bytes")));
        }
        if length.is_some_and(|length| taken.len() as u64 == length) {
            return Ok(taken.freeze());
        }
    }
    match length {
        Some(length) if taken.len() as u64 != length => {
            Err(SourceError::Failed(format!("the answer ended after {} of {length} bytes", taken.len())))
        }
        _ => Ok(taken.freeze()),
    }
}

/// Seconds; a date is not understood and counts as not said.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_PAUSE))
}

pub(super) async fn retry<T>(mut attempt: impl AsyncFnMut() -> Result<T, SourceError>) -> Result<T, SourceError> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        let wait = match attempt().await {
            Err(SourceError::Failed(_)) => pause,
            Err(SourceError::Busy { retry_after }) => retry_after,
            done => return done,
        };
        tokio::time::sleep(wait).await;
        pause *= 2;
    }
    attempt().await
}

/// An error with its causes.
pub(super) fn reason_of(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
