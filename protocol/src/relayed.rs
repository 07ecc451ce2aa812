//! Frames over libp2p: for peers whose data plane cannot be dialled, because a router stands before it.
//!
//! Each libp2p connection to a member, direct, hole-punched or through a relay, is a [`Lane`] on which streams of
//! [`FRAMES_PROTOCOL`] carry the same frames as the data plane's own QUIC. libp2p's handshake has proved who is there, also
//! through a relay, which sees ciphertext only.
//!
//! A relay ends a circuit after some time and some bytes. Who dialled it dials another before that ([`Lane::is_worn`]), which succeeds
//! the first: calls in progress end on the old one, new streams are the new one's, and whoever holds the lane notices nothing.

mod behaviour;
mod handler;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::{Duration, Instant};

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

/// Of each frame, beside its own bytes: heads of Yamux and Noise, and what the control plane adds.
const FRAME_OVERHEAD: u64 = 64;

/// What a relay allows of one circuit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CircuitLimit {
    pub(crate) bytes: Option<u64>,
    pub(crate) time: Option<Duration>,
}

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
    since: Instant,
    /// Bytes of frames, both ways together.
    carried: AtomicU64,
    /// The younger circuit that new streams take.
    successor: SyncMutex<Option<Lane>>,
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
            since: Instant::now(),
            carried: AtomicU64::new(0),
            successor: SyncMutex::new(None),
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
        let current = self.current();
        let address = current.inner.address.clone();
        if current.inner.relayed { Path::Relayed(address) } else { Path::Control(address) }
    }

    /// The lane that new streams take: the last successor that lives, or this one.
    fn current(&self) -> Self {
        self.successor().unwrap_or_else(|| self.clone())
    }

    fn successor(&self) -> Option<Self> {
        let mut next = self.next();
        let mut living = None;
        // Each is younger than the one before, so that this ends.
        while let Some(lane) = next {
            next = lane.next();
            if !lane.inner.closed.is_cancelled() {
                living = Some(lane);
            }
        }
        if let Some(living) = &living {
            // Those between have had their time.
            self.succeed(living);
        }
        living
    }

    fn next(&self) -> Option<Self> {
        self.inner.successor.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn succeed(&self, younger: &Self) {
        *self.inner.successor.lock().unwrap_or_else(PoisonError::into_inner) = Some(younger.clone());
    }

    /// Whether new streams take another lane, so that those of this one had better end.
    pub(crate) fn is_succeeded(&self) -> bool {
        self.successor().is_some()
    }

    /// A frame of so many bytes went over this lane.
    pub(crate) fn carry(&self, bytes: usize) {
        self.inner.carried.fetch_add(bytes as u64 + FRAME_OVERHEAD, Ordering::Relaxed);
    }

    /// Whether this is a circuit that carries frames, has used up half of what its relay allows, and has no successor yet.
    fn is_worn(&self, limit: CircuitLimit) -> bool {
        let carried = self.inner.carried.load(Ordering::Relaxed);
        let bytes = limit.bytes.is_some_and(|bytes| carried >= bytes / 2);
        let time = limit.time.is_some_and(|time| self.inner.since.elapsed() >= time / 2);
        self.inner.relayed && carried > 0 && (bytes || time) && !self.is_succeeded()
    }

    /// A new stream, and the lane it belongs to.
    pub(crate) async fn open(&self) -> Result<(Stream, Self), String> {
        let lane = self.current();
        let (answer, opened) = oneshot::channel();
        let gone = || lane.close_reason();
        lane.inner.opening.send(answer).await.map_err(|_| gone())?;
        let stream = opened.await.map_err(|_| gone())??;
        Ok((stream, lane))
    }

    pub(crate) async fn accept(&self) -> Option<Stream> {
        self.inner.accepted.lock().await.recv().await
    }

    pub(crate) fn round_trip(&self) -> Duration {
        Duration::from_micros(self.current().inner.round_trip_us.load(Ordering::Relaxed))
    }

    /// Returns when this lane and its successors are closed.
    pub(crate) async fn closed(&self) {
        self.inner.closed.cancelled().await;
        while let Some(successor) = self.successor() {
            successor.inner.closed.cancelled().await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.inner.closed.is_cancelled() && !self.is_succeeded()
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
