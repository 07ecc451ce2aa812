//! A connection whose other side is an authenticated peer.

use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::call::{self, IdleStreams};
use super::carrier::{Carrier, Path};
use super::stream::{BODY_BUDGET_KIB, FrameStream};
use super::streams::Streams;
use crate::relayed::Lane;
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
    carrier: Arc<Carrier>,
    peer_id: PeerId,
    idle: Arc<IdleStreams>,
    body_budget: Arc<Semaphore>,
}

impl DataConnection {
    pub(super) fn new(connection: Connection, peer_id: PeerId) -> Self {
        Self::over(Carrier::Quic(connection), peer_id)
    }

    /// A connection whose frames go over a connection of the control plane.
    pub(crate) fn over_lane(lane: Lane) -> Self {
        let peer_id = lane.peer_id();
        Self::over(Carrier::Lane { lane, closed: CancellationToken::new() }, peer_id)
    }

    fn over(carrier: Carrier, peer_id: PeerId) -> Self {
        let body_budget = Arc::new(Semaphore::new(BODY_BUDGET_KIB as usize));
        Self { inner: Arc::new(Inner { carrier: Arc::new(carrier), peer_id, idle: Arc::default(), body_budget }) }
    }

    /// Who is on the other side, as its handshake proves.
    pub fn peer_id(&self) -> PeerId {
        self.inner.peer_id
    }

    /// By which way the other side is reached now; it may move.
    pub fn path(&self) -> Path {
        self.inner.carrier.path()
    }

    /// Sends a hello or a call and waits for the answer, which fits the request or is a [`Refusal`](crate::Refusal).
    ///
    /// Takes a warm stream, or opens one; calls do not wait for one another. When the deadline passes or the future is dropped,
    /// the stream is reset in both directions and never used again: the server notices, and no answer can reach the wrong call.
    ///
    /// # Errors
    /// [`CallError`], as its variants say.
    pub async fn call(&self, frame: &Frame, deadline: Duration) -> Result<Frame, CallError> {
        call::call(&self.inner.carrier, &self.inner.idle, frame, deadline).await
    }

    /// The next stream that the other side opens; `None` once the connection is closed. A dropped future loses nothing.
    pub async fn accept_stream(&self) -> Option<FrameStream> {
        let streams = self.inner.carrier.accept().await?;
        Some(FrameStream::new(streams, self.inner.body_budget.clone()))
    }

    /// Opens a stream of the QUIC below, without frames: the floor beside which calls are measured. `None` where there is no QUIC of the
    /// data plane's own, or the connection is closed.
    pub async fn open_bare(&self) -> Option<(SendStream, RecvStream)> {
        match self.inner.carrier.open().await.ok()? {
            Streams::Quic(send, recv) => Some((send, recv)),
            Streams::Libp2p(_) => None,
        }
    }

    /// The other end of [`DataConnection::open_bare`].
    pub async fn accept_bare(&self) -> Option<(SendStream, RecvStream)> {
        match self.inner.carrier.accept().await? {
            Streams::Quic(send, recv) => Some((send, recv)),
            Streams::Libp2p(_) => None,
        }
    }

    /// Waits until the connection is closed, and says why.
    pub async fn closed(&self) -> String {
        self.inner.carrier.closed().await
    }

    /// Whether the connection is closed.
    pub fn is_closed(&self) -> bool {
        self.inner.carrier.close_reason().is_some()
    }

    /// The round trip as the transport measures it, without computing; a guess before the first measurement.
    pub fn round_trip(&self) -> Duration {
        self.inner.carrier.round_trip()
    }

    /// Closes the connection at once; calls still waiting fail on both sides. On the data plane's own QUIC the other side gets to see
    /// the reason; a connection of the control plane stays open for the control plane.
    pub fn close(&self, reason: &str) {
        self.inner.carrier.close(reason);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        Combine, DataEndpoint, ExpertCall, ExpertRows, FrameLimits, Identity, ModelId, Refusal, RefusalCode, WireDtype,
    };

    #[tokio::test]
    async fn bodies_beyond_the_budget_wait_until_an_earlier_call_is_answered() {
        let patience = Duration::from_secs(20);
        let identity = Identity::generate();
        let localhost = "127.0.0.1:0".parse().expect("an address");
        let far = DataEndpoint::bind(&identity, localhost).expect("a free port");
        let near = DataEndpoint::bind(&Identity::generate(), localhost).expect("a free port");
        let address = far.local_addr().expect("it is bound");
        let accept = async { far.accept().await.expect("open").establish(patience).await.expect("a handshake") };
        let (client, server) = tokio::join!(near.connect(identity.peer_id(), address, patience), accept);
        let client = client.expect("a handshake");

        let call = Frame::Call(ExpertCall {
            request_id: 1,
            model: ModelId([0; 32]),
            layer: 0,
            hidden_size: 256,
            rows: 1,
            dtype: WireDtype::F32,
            combine: Combine::Peer,
            deadline_ms: 20_000,
            assignments: vec![ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }],
            body: Bytes::from(vec![0; 1024]),
        });
        let calls: Vec<_> = (0..2)
            .map(|_| {
                let (client, call) = (client.clone(), call.clone());
                tokio::spawn(async move { client.call(&call, patience).await })
            })
            .collect();

        // For a body and its answer of 1 KiB each.
        let budget = Arc::new(Semaphore::new(2));
        let mut streams = Vec::new();
        for _ in 0..2 {
            let stream = server.inner.carrier.accept().await.expect("a stream");
            streams.push(FrameStream::new(stream, budget.clone()));
        }
        let (mut second, mut first) = (streams.pop().expect("two"), streams.pop().expect("two"));
        first.read(&FrameLimits::default()).await.expect("a call");
        let mut reading = tokio::spawn(async move {
            second.read(&FrameLimits::default()).await.expect("a call");
            second
        });
        let waited = tokio::time::timeout(Duration::from_millis(50), &mut reading).await;
        assert!(waited.is_err(), "the budget is used up");
        let busy = Frame::Refusal(Refusal::new(1, RefusalCode::Busy, "try later"));
        first.write(&busy).await.expect("the client waits");
        let mut second = reading.await.expect("no panic");
        second.write(&busy).await.expect("the client waits");
        for call in calls {
            assert!(call.await.expect("no panic").is_ok());
        }
    }
}
