//! Keeps the directory true: looks for providers in the DHT, one task per peer reads its advert and holds its connection.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::Either;
use futures::stream::FuturesUnordered;
use hanse_protocol::discovery::Reachability;
use hanse_protocol::{
    Advert, DataConnection, DataEndpoint, Frame, Hello, ModelId, Multiaddr, Path, PeerId, Welcome, WireDtype,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::directory::{Directory, Link};
use crate::precision::PrecisionPolicy;
use crate::search::{ADVERT_TIMEOUT, AdvertRead, EAGER_INTERVAL, PeerSearch, advert_pause, calm_pause};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long each of a peer's addresses is dialled before the next one is too.
const DIAL_STAGGER: Duration = Duration::from_millis(250);
/// How long one attempt to find a peer where it was may take.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(2);
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(1);
/// While requests run, a peer that was not heard of for so long is asked whether it is there: it may be the next one to be called,
/// and a dead one is out of every route within 2 s. An idle client asks nobody; a connection's keep-alive is enough for it.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// It answers within this beyond two round trips, or is not called before it has answered a probe.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the direct way is tried alone, where the peer says that there is one, before the control plane's connection is tried beside it.
const HEAD_START: Duration = Duration::from_secs(1);
/// How often a relayed peer is looked at for a hole-punched connection.
const UPGRADE_INTERVAL: Duration = Duration::from_secs(1);
/// Holes that could not be punched are tried again after this; each failure doubles it.
const FIRST_PUNCH_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PUNCH_PAUSE: Duration = Duration::from_secs(600);
/// How often the data-plane addresses of a peer that is reached otherwise are tried again.
const DIRECT_INTERVAL: Duration = Duration::from_secs(30);
/// A peer that is not connected and did not answer this often is forgotten until the DHT names it again.
const FORGET_AFTER: u32 = 3;
/// How often the advert is read of a peer that stores experts in fewer bits than the client accepts.
const UNWANTED_INTERVAL: Duration = Duration::from_secs(30);
/// How many found peers may wait to be watched.
const ARRIVAL_QUEUE: usize = 64;
/// The most peers kept at once.
const MAX_PEERS: usize = 4096;

/// What the tasks of one client share.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) endpoint: DataEndpoint,
    pub(crate) directory: Arc<Directory>,
    pub(crate) search: PeerSearch,
    pub(crate) network: String,
    pub(crate) wire: WireDtype,
    pub(crate) precision: PrecisionPolicy,
}

impl Membership {
    /// Runs until cancelled.
    pub(crate) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let (found, mut arrivals) = mpsc::channel(ARRIVAL_QUEUE);
        let mut peers: JoinSet<PeerId> = JoinSet::new();
        let mut watched: HashSet<PeerId> = HashSet::new();
        let pause = || {
            let complete = self.directory.missing().is_empty();
            if complete { calm_pause(self.directory.peers_known()) } else { EAGER_INTERVAL }
        };
        let search = self.search.run(found, pause);
        tokio::pin!(search);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = &mut search => return,
                Some(peer) = arrivals.recv() => {
                    if watched.len() < MAX_PEERS && watched.insert(peer) {
                        let me = self.clone();
                        let span = tracing::info_span!("peer", %peer);
                        peers.spawn(async move { me.keep_peer(peer).await; peer }.instrument(span));
                    }
                }
                Some(ended) = peers.join_next() => {
                    // A task that panicked cannot say whose it was; its peer stays unwatched until restart.
                    if let Ok(peer) = ended {
                        watched.remove(&peer);
                        self.directory.remove(&peer);
                    }
                }
            }
        }
    }

    /// Watches one peer until it hosts nothing any more or cannot be reached.
    async fn keep_peer(&self, peer: PeerId) {
        let mut misses = 0;
        let mut ways = Ways::new(self.search.model());
        loop {
            let read = match self.directory.link(&peer) {
                Some(link) => match self.keep_link(peer, &link, &mut ways).await {
                    Some(read) => read,
                    None => {
                        tokio::time::sleep(EAGER_INTERVAL).await;
                        continue;
                    }
                },
                None => match self.return_of(peer, &mut ways).await {
                    Some(read) => read,
                    None => {
                        misses = 0;
                        continue;
                    }
                },
            };
            match read {
                Ok(Some(advert)) if !self.precision.accepts(&advert, self.search.model()) => {
                    misses = 0;
                    self.directory.not_wanted(&peer, advert.precision);
                    tokio::time::sleep(UNWANTED_INTERVAL).await;
                    continue;
                }
                Ok(Some(advert)) => {
                    misses = 0;
                    ways.learn(&advert);
                    self.directory.update(peer, advert);
                    if self.directory.link(&peer).is_none() && !self.link_up(peer, &mut ways).await {
                        misses += 1;
                    }
                }
                Ok(None) => return,
                Err(reason) => {
                    misses += 1;
                    tracing::debug!(%reason, "no advert");
                }
            }
            if self.directory.link(&peer).is_none() {
                if misses >= FORGET_AFTER {
                    return;
                }
                tokio::time::sleep(EAGER_INTERVAL * 2u32.pow(misses)).await;
            }
        }
    }

    /// Reads a peer's advert, and meanwhile looks for one that was lost where it was: the control plane may take long to notice
    /// that it is back. `None` if it was found there.
    async fn return_of(&self, peer: PeerId, ways: &mut Ways) -> Option<AdvertRead> {
        let again = async {
            if !ways.is_known() {
                return std::future::pending().await;
            }
            // A handshake repeats its first packet after a time that doubles: new ones are heard sooner. A relay needs longer.
            let patience = if ways.reachability == Reachability::Direct { RECONNECT_TIMEOUT } else { ADVERT_TIMEOUT };
            while !tokio::time::timeout(patience, self.link_up(peer, ways)).await.unwrap_or(false) {
                tokio::time::sleep(EAGER_INTERVAL).await;
            }
        };
        tokio::select! {
            read = self.read_advert(peer) => Some(read),
            () = again => None,
        }
    }

    /// Connects to a peer; whether that worked.
    async fn link_up(&self, peer: PeerId, ways: &mut Ways) -> bool {
        match self.connect(peer, ways).await {
            Ok(link) => {
                self.directory.connected(peer, link);
                true
            }
            Err(reason) => {
                tracing::debug!(%reason, "not connected");
                false
            }
        }
    }

    /// Watches a link until the peer's advert was read again: a closed one is dropped, and a peer that a request complained about
    /// is probed, so that it costs no second request anything. `None` if there is no such link any more.
    ///
    /// A link that is not the data plane's own gives way to a better one as soon as there is one.
    async fn keep_link(&self, peer: PeerId, link: &Link, ways: &mut Ways) -> Option<AdvertRead> {
        let read = async {
            self.until_next_read(&peer).await;
            self.read_advert(peer).await
        };
        tokio::pin!(read);
        let mut changes = self.directory.subscribe();
        let better = self.better_link(peer, link, ways);
        tokio::pin!(better);
        let mut silence = std::pin::pin!(self.silence(peer, link));
        loop {
            let probe_at = self.directory.probe_at(&peer).map(tokio::time::Instant::from_std);
            let probe = async {
                match probe_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                reason = link.connection.closed() => {
                    tracing::debug!(%reason, "connection closed");
                    self.directory.disconnected(&peer);
                    return None;
                }
                () = &mut silence => {
                    tracing::debug!("no heartbeat");
                    self.directory.failed(&peer, Instant::now());
                    silence.set(self.silence(peer, link));
                }
                () = probe => match hello(&link.connection, &self.network, link.welcome.model, HELLO_TIMEOUT).await {
                    Ok(_) => self.directory.recovered(&peer),
                    Err(reason) => {
                        tracing::debug!(%reason, "probe failed");
                        link.connection.close("no answer");
                    }
                },
                better = &mut better => {
                    tracing::debug!(from = %link.path, to = %better.path, "better way found");
                    self.directory.connected(peer, better);
                    return None;
                }
                read = &mut read => return Some(read),
                Ok(()) = changes.changed() => {}
            }
        }
    }

    /// Completes when a peer that is trusted gives no sign of life while requests run.
    async fn silence(&self, peer: PeerId, link: &Link) {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            if !self.directory.is_owed_a_heartbeat(&peer, Instant::now(), HEARTBEAT) {
                continue;
            }
            let timeout = HEARTBEAT_TIMEOUT + 2 * link.connection.round_trip();
            if hello(&link.connection, &self.network, link.welcome.model, timeout).await.is_err() {
                return;
            }
        }
    }

    /// Waits as long as an advert that was just read is taken for true; not long if the peer takes no calls, so that it is used again
    /// soon after it does.
    async fn until_next_read(&self, peer: &PeerId) {
        let begun = tokio::time::Instant::now();
        let mut changes = self.directory.subscribe();
        loop {
            let peers = if self.directory.is_draining(peer) { 0 } else { self.directory.peers_known() };
            let pause = advert_pause(peers);
            tokio::select! {
                () = tokio::time::sleep_until(begun + pause) => return,
                Ok(()) = changes.changed() => {}
            }
        }
    }

    /// The peer's valid advert of our model or a variant of it; `None` when it says that it hosts none of it.
    async fn read_advert(&self, peer: PeerId) -> AdvertRead {
        let Some(advert) = self.search.advert(peer).await? else { return Ok(None) };
        if !advert.wire_dtypes.contains(&self.wire) {
            return Err(format!("it does not speak {} on the wire", self.wire));
        }
        Ok(Some(advert))
    }

    /// The first way that leads to the peer: its data-plane addresses, or the control plane, on a relay if need be.
    async fn connect(&self, peer: PeerId, ways: &mut Ways) -> Result<Link, String> {
        ways.direct_at = tokio::time::Instant::now() + DIRECT_INTERVAL;
        let head_start = if ways.reachability == Reachability::Direct { HEAD_START } else { Duration::ZERO };
        let direct = std::pin::pin!(self.connect_directly(peer, ways));
        let shared = std::pin::pin!(async {
            tokio::time::sleep(head_start).await;
            self.connect_shared(peer, ways.circuits.clone(), ways.model).await
        });
        match futures::future::select(direct, shared).await {
            Either::Left((Ok(link), _)) | Either::Right((Ok(link), _)) => Ok(link),
            Either::Left((Err(reason), shared)) => shared.await.map_err(|other| format!("{reason}; {other}")),
            Either::Right((Err(reason), direct)) => direct.await.map_err(|other| format!("{other}; {reason}")),
        }
    }

    /// All addresses are dialled, each a moment after the one before: one that swallows packets does not hold up the next, and one that
    /// answers at once keeps the others from being dialled.
    async fn connect_directly(&self, peer: PeerId, ways: &Ways) -> Result<Link, String> {
        let mut dials: FuturesUnordered<_> = (0..)
            .zip(&ways.addresses)
            .map(|(place, &address)| async move {
                tokio::time::sleep(DIAL_STAGGER * place).await;
                let connected = self.endpoint.connect(peer, address, CONNECT_TIMEOUT).await.map_err(|e| e.to_string());
                let greeted = match connected {
                    Ok(connection) => self.greet(connection, ways.model).await,
                    Err(reason) => Err(reason),
                };
                greeted.map_err(|reason| format!("{address}: {reason}"))
            })
            .collect();
        let mut reasons = Vec::new();
        while let Some(dialled) = dials.next().await {
            match dialled {
                Ok(link) => return Ok(link),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    }

    /// The best connection of the control plane, which libp2p dials if there is none.
    async fn connect_shared(&self, peer: PeerId, circuits: Vec<Multiaddr>, model: ModelId) -> Result<Link, String> {
        let connected = self.search.discovery().connect_data(peer, circuits, CONNECT_TIMEOUT).await;
        self.greet(connected.map_err(|e| e.to_string())?, model).await
    }

    async fn greet(&self, connection: DataConnection, model: ModelId) -> Result<Link, String> {
        let welcome = hello(&connection, &self.network, model, HELLO_TIMEOUT).await?;
        Ok(Link { path: connection.path(), connection, welcome })
    }

    /// Completes when a better way than `link` was found.
    async fn better_link(&self, peer: PeerId, link: &Link, ways: &mut Ways) -> Link {
        loop {
            if let Path::Data(_) = link.path {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(UPGRADE_INTERVAL).await;
            if link.path.is_relayed()
                && let Ok(shared) = self.connect_shared(peer, Vec::new(), ways.model).await
                && !shared.path.is_relayed()
            {
                return shared;
            }
            if link.path.is_relayed() && ways.punched.elapsed() >= ways.punch_pause {
                ways.punched = tokio::time::Instant::now();
                ways.punch_pause = (ways.punch_pause * 2).min(LONGEST_PUNCH_PAUSE);
                // It fails only where this client ends.
                let _ = self.search.discovery().punch(peer, ways.circuits.clone()).await;
            }
            if tokio::time::Instant::now() >= ways.direct_at {
                ways.direct_at = tokio::time::Instant::now() + DIRECT_INTERVAL;
                if let Ok(direct) = self.connect_directly(peer, ways).await {
                    return direct;
                }
            }
        }
    }
}

/// How a peer may be reached, by its advert.
#[derive(Debug)]
struct Ways {
    /// The model of which it hosts experts: the client's, or a variant of it.
    model: ModelId,
    addresses: Vec<SocketAddr>,
    circuits: Vec<Multiaddr>,
    reachability: Reachability,
    /// When the data-plane addresses are tried next while there is another link.
    direct_at: tokio::time::Instant,
    punched: tokio::time::Instant,
    punch_pause: Duration,
}

impl Ways {
    fn new(model: ModelId) -> Self {
        let now = tokio::time::Instant::now();
        Self {
            model,
            addresses: Vec::new(),
            circuits: Vec::new(),
            reachability: Reachability::Direct,
            direct_at: now,
            punched: now,
            punch_pause: FIRST_PUNCH_PAUSE,
        }
    }

    fn is_known(&self) -> bool {
        !(self.addresses.is_empty() && self.circuits.is_empty())
    }

    fn learn(&mut self, advert: &Advert) {
        self.model = advert.model;
        self.addresses.clone_from(&advert.data_addresses);
        self.circuits.clone_from(&advert.circuits);
        if self.reachability != advert.reachability && advert.reachability == Reachability::Direct {
            // AutoNAT or its router has just told it.
            self.direct_at = tokio::time::Instant::now();
        }
        self.reachability = advert.reachability;
    }
}

/// Opens a data-plane conversation: says which network and model are meant and reads the peer's welcome.
pub(crate) async fn hello(
    connection: &DataConnection,
    network: &str,
    model: ModelId,
    timeout: Duration,
) -> Result<Welcome, String> {
    let hello = Frame::Hello(Hello { network: network.to_owned(), model });
    match connection.call(&hello, timeout).await {
        Ok(Frame::Welcome(welcome)) if welcome.model == model => Ok(welcome),
        Ok(Frame::Refusal(refusal)) => Err(format!("refused ({:?}): {}", refusal.code, refusal.message)),
        Ok(_) => Err("answered a hello with another kind of frame".into()),
        Err(error) => Err(error.to_string()),
    }
}
