//! One request and its answer on a warm stream.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use super::carrier::Carrier;
use super::runtime::data_runtime;
use super::streams::Streams;
use crate::frame::Encoded;
use crate::{Frame, FrameError, FrameKind, FrameLimits};

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
pub(super) struct IdleStreams(Mutex<Vec<Streams>>);

impl IdleStreams {
    fn take(&self) -> Option<Streams> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| idle.pop()).find(|streams| !streams.is_succeeded())
    }

    fn put(&self, streams: Streams) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(streams);
        }
        // Otherwise it is dropped, which ends it in the ordinary way.
    }
}

/// A stream with a call on it. Unless it is given back, both directions are reset.
struct Lease {
    streams: Option<Streams>,
    idle: Arc<IdleStreams>,
}

impl Lease {
    fn give_back(mut self) {
        if let Some(streams) = self.streams.take() {
            self.idle.put(streams);
        }
    }

    async fn exchange(&mut self, encoded: Encoded) -> Result<Frame, FrameError> {
        let streams = self.streams.as_mut().ok_or(FrameError::Poisoned)?;
        match streams.write(encoded).await {
            // The server may have refused before it read all: its refusal is there to be read.
            Ok(()) | Err(FrameError::Reset) => {
                streams.read(&FrameLimits::default(), async |_, _| ()).await.map(|(frame, ())| frame)
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(mut streams) = self.streams.take() {
            streams.cancel();
        }
    }
}

pub(super) async fn call(
    carrier: &Arc<Carrier>,
    idle: &Arc<IdleStreams>,
    request: &Frame,
    deadline: Duration,
) -> Result<Frame, CallError> {
    if !matches!(request, Frame::Hello(_) | Frame::Call(_) | Frame::Fetch(_)) {
        return Err(CallError::NotARequest(request.kind()));
    }
    let encoded = Encoded::new(request).map_err(CallError::Request)?;
    let asking = ask(carrier.clone(), idle.clone(), encoded);
    let asking = async move { tokio::time::timeout(deadline, asking).await.unwrap_or(Err(CallError::Late(deadline))) };
    // In the thread of the connection: each part of an answer that arrives would wake the caller's thread up.
    let asked = AbortOnDropHandle::new(data_runtime().spawn(asking)).await;
    let (answer, lease) = asked.map_err(|error| CallError::ConnectionLost(error.to_string()))??;
    if !request.is_answered_by(&answer) {
        return Err(CallError::BadAnswer(answer.kind()));
    }
    if !matches!(&answer, Frame::Refusal(refusal) if refusal.code.ends_stream()) {
        lease.give_back();
    }
    Ok(answer)
}

/// The answer, and the stream that it came on.
async fn ask(carrier: Arc<Carrier>, idle: Arc<IdleStreams>, encoded: Encoded) -> Result<(Frame, Lease), CallError> {
    if let Some(streams) = idle.take() {
        let mut lease = Lease { streams: Some(streams), idle: idle.clone() };
        match lease.exchange(encoded.clone()).await {
            // Most likely the server had ended the idle stream before: once more, on a new one. Experts are pure functions, so
            // that it does no harm if the call was already computed.
            Err(FrameError::Closed | FrameError::Reset) if carrier.close_reason().is_none() => {}
            result => return result.map(|answer| (answer, lease)).map_err(|error| why(&carrier, error)),
        }
    }
    let streams = carrier.open().await.map_err(CallError::ConnectionLost)?;
    let mut lease = Lease { streams: Some(streams), idle };
    let answer = lease.exchange(encoded).await.map_err(|error| why(&carrier, error))?;
    Ok((answer, lease))
}

fn why(carrier: &Carrier, error: FrameError) -> CallError {
    match carrier.close_reason() {
        Some(reason) => CallError::ConnectionLost(reason),
        None => CallError::Stream(error),
    }
}
