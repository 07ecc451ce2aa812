//! The serving side of one stream.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::streams::Streams;
use crate::frame::Encoded;
use crate::{Frame, FrameError, FrameLimits};

/// What the bodies of unanswered calls and of their answers may occupy together, in KiB, on one connection: a stranger cannot fill
/// the memory by opening many streams. The largest body and the largest answer.
pub(super) const BODY_BUDGET_KIB: u32 = 128 << 10;
/// The same on all connections of the process: nor can many strangers.
const TOTAL_BUDGET_KIB: u32 = 1 << 20;

static TOTAL_BUDGET: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(TOTAL_BUDGET_KIB as usize)));

/// Priority of chunks below that of everything else.
const BULK: i32 = -1;

/// How long a finished stream waits until the other side has everything.
const FINISH_TIME: Duration = Duration::from_secs(2);

/// A stream on which the other side sends requests, one after another, and waits for the answer to each.
///
/// Dropped, it ends in the ordinary way, and what was written still arrives while the connection lives. Dropped within a write it is
/// reset, so that the other side cannot take half a frame for the end.
#[derive(Debug)]
pub struct FrameStream {
    streams: Streams,
    budget: Arc<Semaphore>,
    /// What the last request took of the connection's budget and of all connections'; given back when it is answered.
    taken: Option<[OwnedSemaphorePermit; 2]>,
    reading: State,
    writing: State,
}

/// Where one direction of a stream is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// Between two frames.
    Ready,
    /// Within a frame: for good, if the read or write failed or was dropped.
    InFrame,
    /// Ended with a refusal.
    Ended,
}

impl State {
    fn enter_frame(&mut self) -> Result<(), FrameError> {
        if *self != Self::Ready {
            return Err(FrameError::Poisoned);
        }
        *self = Self::InFrame;
        Ok(())
    }
}

impl FrameStream {
    pub(super) fn new(streams: Streams, budget: Arc<Semaphore>) -> Self {
        Self { streams, budget, taken: None, reading: State::Ready, writing: State::Ready }
    }

    /// The next request; waits for it as long as the connection lives.
    ///
    /// The bodies of a request and of its answer count against a budget that all streams of the connection share, and one for all
    /// connections, until the answer is written: when one is used up, bodies wait to be read, and the sender is held back.
    ///
    /// A dropped future leaves the stream unreadable.
    ///
    /// # Errors
    /// As for [`read_frame`](crate::read_frame); after an error write [`FrameError::refusal`] back, if there is one, and drop the
    /// stream. [`FrameError::Poisoned`] if the stream can no longer be read.
    pub async fn read(&mut self, limits: &FrameLimits) -> Result<Frame, FrameError> {
        self.reading.enter_frame()?;
        self.taken = None;
        let budget = self.budget.clone();
        let admit = async move |_: u32, memory: u64| {
            let kib = memory.div_ceil(1024).min(BODY_BUDGET_KIB.into()) as u32;
            // The semaphores are never closed. Everyone takes of them in this order, and once for each request.
            let own = budget.acquire_many_owned(kib).await.ok()?;
            let total = TOTAL_BUDGET.clone().acquire_many_owned(kib).await.ok()?;
            Some([own, total])
        };
        let (frame, taken) = self.streams.read(limits, admit).await?;
        self.reading = State::Ready;
        self.taken = taken;
        Ok(frame)
    }

    /// Writes an answer. After a refusal that [ends the stream](crate::RefusalCode::ends_stream) the stream is closed in both
    /// directions, so that a sender in the middle of a large frame stops.
    ///
    /// A dropped future leaves the stream unusable; the other side sees a reset.
    ///
    /// # Errors
    /// As for [`write_frame`](crate::write_frame), and [`FrameError::TooSlow`] if the other side does not take the frame within 30 s.
    pub async fn write(&mut self, frame: &Frame) -> Result<(), FrameError> {
        let encoded = Encoded::new(frame)?;
        self.writing.enter_frame()?;
        // Weights go out only while no answer waits to be sent on this connection.
        self.streams.set_priority(if matches!(frame, Frame::Chunk(_)) { BULK } else { 0 });
        let time = FrameLimits::default().frame_time;
        match tokio::time::timeout(time, self.streams.write(encoded)).await {
            Err(_) => return Err(FrameError::TooSlow(time)),
            Ok(result) => result?,
        }
        self.writing = State::Ready;
        self.taken = None;
        if matches!(frame, Frame::Refusal(refusal) if refusal.code.ends_stream()) {
            (self.reading, self.writing) = (State::Ended, State::Ended);
            let _ = tokio::time::timeout(FINISH_TIME, self.streams.end_refused()).await;
        }
        Ok(())
    }

    /// Returns when nobody waits for the answer any more: the other side reset the stream, or the connection is gone.
    ///
    /// A dropped future leaves nothing behind.
    pub async fn cancelled(&mut self) {
        self.streams.given_up().await;
    }

    /// Ends the stream and waits, at most two seconds, until the other side has all that was written: for a server that leaves and
    /// is about to close its connections.
    pub async fn finish(mut self) {
        if self.writing == State::Ready {
            let _ = tokio::time::timeout(FINISH_TIME, self.streams.finish()).await;
        }
    }
}

impl Drop for FrameStream {
    fn drop(&mut self) {
        if self.writing == State::InFrame {
            self.streams.reset_sending();
        }
    }
}
