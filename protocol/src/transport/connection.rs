//! A connection whose other side is an authenticated peer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use quinn::Connection;
use tokio::sync::Semaphore;

use super::call::{self, IdleStreams};
use super::settings::CLOSED;
use super::stream::{BODY_BUDGET_KIB, FrameStream};
use crate::{CallError, Frame};

/// A connection to a peer that has proved its id. Clones share the connection; it closes when the last one is dropped.
///
/// Either side may call and serve; in Hanse the one who dialled calls.
#[derive(Debug, Clone)]
pub struct DataConnection {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    peer_id: PeerId,
    idle: IdleStreams,
    body_budget: Arc<Semaphore>,
}

impl DataConnection {
    pub(super) fn new(connection: Connection, peer_id: PeerId) -> Self {
        let body_budget = Arc::new(Semaphore::new(BODY_BUDGET_KIB as usize));
        Self { inner: Arc::new(Inner { connection, peer_id, idle: IdleStreams::default(), body_budget }) }
    }

    /// Who is on the other side, as its TLS certificate proves.
    pub fn peer_id(&self) -> PeerId {
        self.inner.peer_id
    }

    /// Where the other side is now; it may move.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.connection.remote_address()
    }

    /// Sends a hello or a call and waits for the answer, which fits the request or is a [`Refusal`](crate::Refusal).
    ///
    /// Takes a warm stream, or opens one; calls do not wait for one another. When the deadline passes or the future is dropped,
    /// the stream is reset in both directions and never used again: the server notices, and no answer can reach the wrong call.
    ///
    /// # Errors
    /// [`CallError`], as its variants say.
    pub async fn call(&self, frame: &Frame, deadline: Duration) -> Result<Frame, CallError> {
        call::call(&self.inner.connection, &self.inner.idle, frame, deadline).await
    }

    /// The next stream that the other side opens; `None` once the connection is closed. A dropped future loses nothing.
    pub async fn accept_stream(&self) -> Option<FrameStream> {
        let streams = self.inner.connection.accept_bi().await.ok()?;
        Some(FrameStream::new(streams, self.inner.body_budget.clone()))
    }

    /// Waits until the connection is closed, and says why.
    pub async fn closed(&self) -> String {
        self.inner.connection.closed().await.to_string()
    }

    /// Whether the connection is closed.
    pub fn is_closed(&self) -> bool {
        self.inner.connection.close_reason().is_some()
    }

    /// The round trip as QUIC measures it, without computing; a guess before the first measurement.
    pub fn round_trip(&self) -> Duration {
        self.inner.connection.rtt()
    }

    /// Closes the connection at once, with a reason that the other side gets to see; calls still waiting fail on both sides.
    pub fn close(&self, reason: &str) {
        self.inner.connection.close(CLOSED, reason.as_bytes());
    }
}
