//! The two directions of one stream, whichever transport carries it.

use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use tokio_util::sync::CancellationToken;

use super::settings::{CANCELLED, REFUSED};
use crate::frame::{Encoded, read_frame_admitted};
use crate::relayed::Lane;
use crate::{Frame, FrameError, FrameLimits};

/// A bidirectional stream of a connection.
#[derive(Debug)]
pub(super) enum Streams {
    /// Of the data plane's own QUIC.
    Quic(SendStream, RecvStream),
    /// Of a libp2p connection.
    Libp2p(Box<Libp2pStream>),
}

/// A libp2p stream with a small buffer for what was read too early.
#[derive(Debug)]
pub(super) struct Libp2pStream {
    /// `None` once it has been given up: dropping the stream is the only way to reset it.
    stream: Option<BufReader<Compat<libp2p::Stream>>>,
    lane: Lane,
    /// Whether the connection it belongs to was closed on this side.
    closed: CancellationToken,
}

impl Streams {
    pub(super) fn libp2p(stream: libp2p::Stream, lane: Lane, closed: CancellationToken) -> Self {
        Self::Libp2p(Box::new(Libp2pStream { stream: Some(BufReader::new(stream.compat())), lane, closed }))
    }

    /// Whether its connection is about to end, and new streams take another.
    pub(super) fn is_succeeded(&self) -> bool {
        matches!(self, Self::Libp2p(inner) if inner.lane.is_succeeded())
    }

    /// Writes head and body without copying them together.
    pub(super) async fn write(&mut self, Encoded { head, body }: Encoded) -> Result<(), FrameError> {
        match self {
            Self::Quic(send, _) => {
                let result = if body.is_empty() {
                    send.write_chunk(head).await
                } else {
                    send.write_all_chunks(&mut [head, body]).await
                };
                result.map_err(|error| FrameError::from_io(error.into()))
            }
            Self::Libp2p(inner) => {
                let stream = inner.stream.as_mut().ok_or(FrameError::Poisoned)?;
                inner.lane.carry(head.len() + body.len());
                let write = async {
                    stream.write_all(&head).await?;
                    stream.write_all(&body).await?;
                    stream.flush().await
                };
                tokio::select! {
                    written = write => written.map_err(gave_up),
                    () = inner.closed.cancelled() => Err(FrameError::Reset),
                }
            }
        }
    }

    pub(super) async fn read<P>(
        &mut self,
        limits: &FrameLimits,
        admit: impl AsyncFnOnce(u32, u64) -> P,
    ) -> Result<(Frame, P), FrameError> {
        match self {
            Self::Quic(_, recv) => read_frame_admitted(recv, limits, admit).await,
            Self::Libp2p(inner) => {
                let stream = inner.stream.as_mut().ok_or(FrameError::Poisoned)?;
                let admit = async |bytes: u32, memory: u64| {
                    inner.lane.carry(bytes as usize);
                    admit(bytes, memory).await
                };
                tokio::select! {
                    read = read_frame_admitted(stream, limits, admit) => read,
                    () = inner.closed.cancelled() => Err(FrameError::Closed),
                }
            }
        }
    }

    /// Of two streams of a QUIC connection that have something to send, the one with the higher priority goes first.
    pub(super) fn set_priority(&mut self, priority: i32) {
        if let Self::Quic(send, _) = self {
            // It fails only where the stream is closed already.
            let _ = send.set_priority(priority);
        }
    }

    /// Gives both directions up: nobody waits for the answer any more.
    pub(super) fn cancel(&mut self) {
        match self {
            Self::Quic(send, recv) => {
                // Both fail only where the stream is closed already.
                let _ = send.reset(CANCELLED);
                let _ = recv.stop(CANCELLED);
            }
            Self::Libp2p(inner) => inner.stream = None,
        }
    }

    /// Resets the sending direction, so that half a frame is not taken for the end.
    pub(super) fn reset_sending(&mut self) {
        match self {
            Self::Quic(send, _) => {
                // Fails only where the stream is closed already.
                let _ = send.reset(CANCELLED);
            }
            Self::Libp2p(inner) => inner.stream = None,
        }
    }

    /// Ends both directions after a refusal that leaves the stream unusable: what was written still arrives, and a sender in the
    /// middle of a large frame stops.
    pub(super) async fn end_refused(&mut self) {
        match self {
            Self::Quic(send, recv) => {
                // Both fail only where the stream is closed already.
                let _ = send.finish();
                let _ = recv.stop(REFUSED);
            }
            Self::Libp2p(inner) => {
                if let Some(mut stream) = inner.stream.take() {
                    // Fails only where the stream is closed already. Dropping it then stops the sender.
                    let _ = stream.shutdown().await;
                }
            }
        }
    }

    /// Returns when the other side has given the stream up, or the connection is gone. Cancel safe.
    pub(super) async fn given_up(&mut self) {
        match self {
            // Each of its results means the same here.
            Self::Quic(send, _) => drop(send.stopped().await),
            Self::Libp2p(inner) => {
                let Some(stream) = inner.stream.as_mut() else { return };
                let ended = async {
                    // A caller sends nothing while it waits: the next thing there is to read is the end.
                    if stream.fill_buf().await.is_ok_and(|early| !early.is_empty()) {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    () = ended => {}
                    () = inner.closed.cancelled() => {}
                }
            }
        }
    }

    /// Ends the sending direction and waits until the other side has everything.
    pub(super) async fn finish(&mut self) {
        match self {
            Self::Quic(send, _) => {
                // Fails only where the stream is closed already.
                let _ = send.finish();
                let _ = send.stopped().await;
            }
            Self::Libp2p(inner) => {
                if let Some(stream) = inner.stream.as_mut() {
                    // Fails only where the stream is closed already.
                    let _ = stream.shutdown().await;
                }
            }
        }
    }
}

/// Writing to a stream that the other side gave up fails in as many ways as there are transports below.
fn gave_up(error: std::io::Error) -> FrameError {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::WriteZero => {
            FrameError::Reset
        }
        _ => FrameError::Io(error),
    }
}
