//! One request and its answer on a warm stream.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};

use super::settings::CANCELLED;
use super::stream::write_encoded;
use crate::frame::Encoded;
use crate::{Frame, FrameError, FrameKind, FrameLimits, read_frame};

/// Idle streams kept for later calls.
const MAX_IDLE: usize = 64;

/// Why a call has no answer. A [`Refusal`](crate::Refusal) is an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The frame breaks a rule of the protocol: the caller's fault. Nothing was sent.
    #[error("the request cannot be sent: {0}")]
    Request(FrameError),
    /// Only hello, call and fetch frames are answered. Nothing was sent.
    #[error("a {0:?} frame is no request")]
    NotARequest(FrameKind),
    /// No answer in time; the server has been told that nobody waits any more. Ask another replica.
    #[error("no answer within {0:?}")]
    Late(Duration),
    /// The connection is lost. Ask another replica, or dial again.
    #[error("the connection is lost: {0}")]
    ConnectionLost(String),
    /// The peer gave the stream up, or sent something that is no frame. Ask another replica.
    #[error("no proper answer: {0}")]
    Stream(FrameError),
    /// A proper frame, but no answer to this request. The peer's fault: do not ask it again.
    #[error("the peer answered with a {0:?} frame that does not fit the request")]
    BadAnswer(FrameKind),
}

/// Streams on which no call is outstanding.
#[derive(Debug, Default)]
pub(super) struct IdleStreams(Mutex<Vec<(SendStream, RecvStream)>>);

impl IdleStreams {
    fn take(&self) -> Option<(SendStream, RecvStream)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put(&self, streams: (SendStream, RecvStream)) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(streams);
        }
        // Otherwise it is dropped, which ends it in the ordinary way.
    }
}

/// A stream with a call on it. Unless it is given back, both directions are reset.
struct Lease<'a> {
    streams: Option<(SendStream, RecvStream)>,
    idle: &'a IdleStreams,
}

impl Lease<'_> {
    fn give_back(mut self) {
        if let Some(streams) = self.streams.take() {
            self.idle.put(streams);
        }
    }

    async fn exchange(&mut self, encoded: Encoded) -> Result<Frame, FrameError> {
        let (send, recv) = self.streams.as_mut().ok_or(FrameError::Poisoned)?;
        match write_encoded(send, encoded).await {
            // The server may have refused before it read all: its refusal is there to be read.
            Ok(()) | Err(FrameError::Reset) => read_frame(recv, &FrameLimits::default()).await,
            Err(error) => Err(error),
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some((mut send, mut recv)) = self.streams.take() {
            // Both fail only where the stream is closed already.
            let _ = send.reset(CANCELLED);
            let _ = recv.stop(CANCELLED);
        }
    }
}

pub(super) async fn call(
    connection: &Connection,
    idle: &IdleStreams,
    request: &Frame,
    deadline: Duration,
) -> Result<Frame, CallError> {
    if !matches!(request, Frame::Hello(_) | Frame::Call(_) | Frame::Fetch(_)) {
        return Err(CallError::NotARequest(request.kind()));
    }
    let encoded = Encoded::new(request).map_err(CallError::Request)?;
    tokio::time::timeout(deadline, ask(connection, idle, request, encoded))
        .await
        .unwrap_or(Err(CallError::Late(deadline)))
}

async fn ask(
    connection: &Connection,
    idle: &IdleStreams,
    request: &Frame,
    encoded: Encoded,
) -> Result<Frame, CallError> {
    if let Some(streams) = idle.take() {
        let mut lease = Lease { streams: Some(streams), idle };
        match lease.exchange(encoded.clone()).await {
            // Most likely the server had ended the idle stream before: once more, on a new one. Experts are pure functions, so
            // that it does no harm if the call was already computed.
            Err(FrameError::Closed | FrameError::Reset) if connection.close_reason().is_none() => {}
            result => return finish(connection, request, lease, result),
        }
    }
    let streams = connection.open_bi().await.map_err(|error| CallError::ConnectionLost(error.to_string()))?;
    let mut lease = Lease { streams: Some(streams), idle };
    let result = lease.exchange(encoded).await;
    finish(connection, request, lease, result)
}

fn finish(
    connection: &Connection,
    request: &Frame,
    lease: Lease<'_>,
    result: Result<Frame, FrameError>,
) -> Result<Frame, CallError> {
    let answer = result.map_err(|error| match connection.close_reason() {
        Some(reason) => CallError::ConnectionLost(reason.to_string()),
        None => CallError::Stream(error),
    })?;
    if !request.is_answered_by(&answer) {
        return Err(CallError::BadAnswer(answer.kind()));
    }
    if !matches!(&answer, Frame::Refusal(refusal) if refusal.code.ends_stream()) {
        lease.give_back();
    }
    Ok(answer)
}
