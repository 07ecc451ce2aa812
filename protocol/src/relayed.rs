//! Frames over libp2p: for peers whose data plane cannot be dialled, because a router stands before it.
//!
//! Each libp2p connection to a member, direct, hole-punched or through a relay, is a [`Lane`] on which streams of
//! [`FRAMES_PROTOCOL`] carry the same frames as the data plane's own QUIC. libp2p's handshake has proved who is there, also
//! through a relay, which sees ciphertext only.

mod behaviour;
mod handler;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::Path;

pub(crate) use behaviour::Behaviour;

/// The protocol's name in multistream negotiation.
pub(crate) const FRAMES_PROTOCOL: StreamProtocol = StreamProtocol::new("/hanse/frames/1");

/// Streams that the other side opened and that wait to be served; more are dropped.
const MAX_WAITING_STREAMS: usize = 64;
/// Streams that this side waits for at a time; more callers wait to ask.
const OPENING_QUEUE: usize = 16;
/// Taken for the round trip until it is measured, which happens as soon as the connection stands.
const FIRST_ROUND_TRIP: Duration = Duration::from_millis(50);

type Opening = oneshot::Sender<Result<Stream, String>>;

/// Whether an address leads through a relay.
pub(crate) fn is_circuit(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// One libp2p connection, as far as frames are concerned. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    peer: PeerId,
    address: Multiaddr,
    relayed: bool,
    opening: mpsc::Sender<Opening>,
    accepted: Mutex<mpsc::Receiver<Stream>>,
    round_trip_us: AtomicU64,
    closed: CancellationToken,
}

/// The ends of a lane's queues that its connection handler holds.
#[derive(Debug)]
struct LaneEnds {
    opening: mpsc::Receiver<Opening>,
    accepted: mpsc::Sender<Stream>,
}

impl Lane {
    fn new(peer: PeerId, address: Multiaddr, relayed: bool) -> (Self, LaneEnds) {
        let (opening, asked) = mpsc::channel(OPENING_QUEUE);
        let (arrived, accepted) = mpsc::channel(MAX_WAITING_STREAMS);
        let first = u64::try_from(FIRST_ROUND_TRIP.as_micros()).unwrap_or(u64::MAX);
        let inner = Inner {
            peer,
            address,
            relayed,
            opening,
            accepted: Mutex::new(accepted),
            round_trip_us: AtomicU64::new(first),
            closed: CancellationToken::new(),
        };
        (Self { inner: Arc::new(inner) }, LaneEnds { opening: asked, accepted: arrived })
    }

    pub(crate) fn peer_id(&self) -> PeerId {
        self.inner.peer
    }

    pub(crate) fn is_relayed(&self) -> bool {
        self.inner.relayed
    }

    pub(crate) fn path(&self) -> Path {
        let address = self.inner.address.clone();
        if self.inner.relayed { Path::Relayed(address) } else { Path::Control(address) }
    }

    pub(crate) async fn open(&self) -> Result<Stream, String> {
        let (answer, opened) = oneshot::channel();
        let gone = || self.close_reason();
        self.inner.opening.send(answer).await.map_err(|_| gone())?;
        opened.await.map_err(|_| gone())?
    }

    pub(crate) async fn accept(&self) -> Option<Stream> {
        self.inner.accepted.lock().await.recv().await
    }

    pub(crate) fn round_trip(&self) -> Duration {
        Duration::from_micros(self.inner.round_trip_us.load(Ordering::Relaxed))
    }

    pub(crate) async fn closed(&self) {
        self.inner.closed.cancelled().await;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.inner.closed.is_cancelled()
    }

    pub(crate) fn close_reason(&self) -> String {
        let way = if self.inner.relayed { "relayed" } else { "control" };
        format!("the {way} connection to {} is closed", self.inner.peer)
    }

    fn measured(&self, round_trip: Duration) {
        let us = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
        self.inner.round_trip_us.store(us, Ordering::Relaxed);
    }
}
