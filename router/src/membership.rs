//! Keeps the directory true: looks for providers in the DHT, one task per peer reads its advert and holds its connection.

mod ways;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_protocol::discovery::Reachability;
use hanse_protocol::{DataConnection, DataEndpoint, Frame, Hello, ModelId, PeerId, Welcome, WireDtype};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::directory::{Directory, Link};
use crate::precision::PrecisionPolicy;
use crate::search::{ADVERT_TIMEOUT, AdvertRead, EAGER_INTERVAL, PeerSearch, advert_pause, calm_pause};
use ways::Ways;

/// How long one attempt to find a peer where it was may take.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(2);
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(1);
/// While requests run, a peer that was not heard of for so long is asked whether it is there: it may be the next one to be called,
/// and a dead one is out of every route within 2 s. An idle client asks nobody; a connection's keep-alive is enough for it.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// It answers within this beyond two round trips, or is not called before it has answered a probe.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(500);
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
