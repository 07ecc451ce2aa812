//! Peers as sources: found through the DHT, asked over the data plane.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use hanse_protocol::discovery::Discovery;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::{
    Advert, CHAINING_VALUE_BYTES, DataConnection, DataEndpoint, Fetch, Frame, HostedExperts, Identity, MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES, ModelId, PeerId, RefusalCode, SignedManifest, Wanted, group_count,
};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::source::{Item, Source, SourceError, What};
use crate::membership::{HELLO_TIMEOUT, hello};
use crate::network::{JoinError, NetworkConfig, bind_any, join_control_plane};

/// Look-ups follow each other this fast until somebody is found, and then this slowly.
const EAGER_INTERVAL: Duration = Duration::from_millis(300);
const CALM_INTERVAL: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long one chunk may take.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(15);
/// Chunks asked of one peer at a time.
const PARALLEL: usize = 3;
/// Peers visited at a time: most of those that do not answer have left.
const VISITS: usize = 16;
/// The most peers kept at once.
const MAX_PEERS: usize = 64;

/// The peers of one model that give out its weights.
#[derive(Debug)]
pub struct Peers {
    shared: Arc<Shared>,
    /// Made for fetching alone, and ended with it.
    own: Option<(Discovery, DataEndpoint)>,
    _search: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    discovery: Discovery,
    endpoint: DataEndpoint,
    network: String,
    model: ModelId,
    peers: RwLock<HashMap<PeerId, Arc<Peer>>>,
    /// Those that give the trunk too.
    trunk: RwLock<HashSet<PeerId>>,
    found: watch::Sender<usize>,
}

/// One of them.
#[derive(Debug)]
struct Peer {
    id: PeerId,
    model: ModelId,
    connection: DataConnection,
    hosted: HostedExperts,
    requests: AtomicU64,
}

/// Why there is no manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestSearchError {
    /// Nobody gives out the weights of this model.
    #[error("no peer gives out model {model}{}", said(.reasons))]
    Nobody {
        /// The model.
        model: ModelId,
        /// What those said who were asked.
        reasons: Vec<String>,
    },
}

fn said(reasons: &[String]) -> String {
    if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) }
}

impl Peers {
    /// Joins the network for fetching only, as a client with an identity of its own.
    ///
    /// # Errors
    /// As [`ExpertNetwork::join`](crate::ExpertNetwork::join), as far as it goes.
    pub async fn join(model: ModelId, config: &NetworkConfig) -> Result<Self, JoinError> {
        let identity = Identity::generate();
        let discovery = join_control_plane(&identity, config).await?;
        let endpoint = bind_any(&identity)?;
        if let Err(reason) = discovery.wait_connected(config.join_timeout).await {
            endpoint.close().await;
            discovery.shutdown().await;
            return Err(JoinError::Unreachable { addresses: config.bootstrap.clone(), reason: Box::new(reason) });
        }
        let mut this = Self::new(discovery.clone(), endpoint.clone(), config.network.clone(), model);
        this.own = Some((discovery, endpoint));
        Ok(this)
    }

    /// Looks for peers by means that others use too.
    #[must_use]
    pub fn new(discovery: Discovery, endpoint: DataEndpoint, network: String, model: ModelId) -> Self {
        let found = watch::channel(0).0;
        let shared = Arc::new(Shared {
            discovery,
            endpoint,
            network,
            model,
            peers: RwLock::default(),
            trunk: RwLock::default(),
            found,
        });
        let search = AbortOnDropHandle::new(tokio::spawn(shared.clone().search()));
        Self { shared, own: None, _search: search }
    }

    /// Leaves the network, if it was joined for fetching only.
    pub async fn shutdown(&self) {
        if let Some((discovery, endpoint)) = &self.own {
            endpoint.close().await;
            discovery.shutdown().await;
        }
    }

    /// The peers that may have the item: first those that say so, then those that may have all of the model.
    #[must_use]
    pub fn sources(&self, item: &Item) -> Vec<Arc<dyn Source>> {
        let peers = self.shared.peers.read().unwrap_or_else(PoisonError::into_inner);
        let trunk = self.shared.trunk.read().unwrap_or_else(PoisonError::into_inner);
        let says_so = |peer: &Peer| match &item.what {
            What::Expert { layer, expert } => peer.hosted.contains(*layer, *expert),
            What::Trunk(_) | What::File(_) => trunk.contains(&peer.id),
        };
        let mut open: Vec<Arc<Peer>> = peers.values().filter(|peer| !peer.connection.is_closed()).cloned().collect();
        open.sort_by_key(|peer| (!says_so(peer), peer.connection.round_trip()));
        open.retain(|peer| says_so(peer) || trunk.contains(&peer.id));
        open.into_iter().map(|peer| peer as Arc<dyn Source>).collect()
    }

    /// Fetches the model's manifest from whoever gives it first, whose name comes with it. It is believed because its hash is the model's id.
    ///
    /// # Errors
    /// `Nobody` after `patience`.
    pub async fn manifest(&self, patience: Duration) -> Result<(String, SignedManifest), ManifestSearchError> {
        let deadline = tokio::time::Instant::now() + patience;
        let mut found = self.shared.found.subscribe();
        let mut reasons = HashMap::new();
        loop {
            let peers: Vec<Arc<Peer>> = {
                let peers = self.shared.peers.read().unwrap_or_else(PoisonError::into_inner);
                peers.values().filter(|peer| !reasons.contains_key(&peer.id)).cloned().collect()
            };
            for peer in peers {
                match peer.manifest().await {
                    Ok(manifest) => return Ok((peer.name(), manifest)),
                    Err(reason) => {
                        tracing::debug!(peer = %peer.id, %reason, "no manifest");
                        reasons.insert(peer.id, reason);
                    }
                }
            }
            if tokio::time::timeout_at(deadline, found.changed()).await.is_err() {
                let reasons = reasons.into_iter().map(|(peer, reason)| format!("{peer}: {reason}")).collect();
                return Err(ManifestSearchError::Nobody { model: self.shared.model, reasons });
            }
        }
    }
}

impl Shared {
    async fn search(self: Arc<Self>) {
        loop {
            self.look().await;
            let known = {
                let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
                peers.retain(|_, peer| !peer.connection.is_closed());
                peers.len()
            };
            tokio::time::sleep(if known == 0 { EAGER_INTERVAL } else { CALM_INTERVAL }).await;
        }
    }

    /// Visits peers as the DHT names them: it may go on for long about others who have left.
    async fn look(&self) {
        let trunk = self.providers(ProviderKey::trunk(self.model)).map(|id| (id, true));
        let weights = self.providers(ProviderKey::weights(self.model)).map(|id| (id, false));
        let (mut named, mut trunk_now) = (HashSet::new(), HashSet::new());
        let new = futures::stream::select(trunk, weights).filter_map(|(id, has_trunk)| {
            if has_trunk {
                trunk_now.insert(id);
                self.trunk.write().unwrap_or_else(PoisonError::into_inner).insert(id);
            }
            let is_new = named.len() < MAX_PEERS && named.insert(id);
            std::future::ready(is_new.then_some(id))
        });
        new.for_each_concurrent(VISITS, |id| self.visit(id)).await;
        *self.trunk.write().unwrap_or_else(PoisonError::into_inner) = trunk_now;
    }

    fn providers(&self, key: ProviderKey) -> impl Stream<Item = PeerId> {
        let asked = futures::stream::once(self.discovery.providers(key));
        asked.filter_map(|named| std::future::ready(named.ok())).flat_map(|named| {
            futures::stream::unfold(named, |mut named| async { named.recv().await.map(|id| (id, named)) })
        })
    }

    /// Reads the peer's advert anew and connects if there is no connection.
    async fn visit(&self, id: PeerId) {
        if id == self.discovery.peer_id() {
            return;
        }
        let Ok(adverts) = self.discovery.adverts(id, Some(self.model)).await else { return };
        let Some(advert) = adverts.into_iter().find(|advert| advert.model == self.model) else { return };
        let known = self.peers.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let connection = match known.filter(|peer| !peer.connection.is_closed()) {
            Some(peer) => peer.connection.clone(),
            None => match self.connect(id, &advert).await {
                Some(connection) => connection,
                None => return,
            },
        };
        let model = self.model;
        let requests = AtomicU64::new(1);
        let peer = Peer { id, model, connection, hosted: advert.hosted, requests };
        self.peers.write().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(peer));
        self.found.send_modify(|count| *count += 1);
    }

    async fn connect(&self, id: PeerId, advert: &Advert) -> Option<DataConnection> {
        for address in &advert.data_addresses {
            let connected = self.endpoint.connect(id, *address, CONNECT_TIMEOUT).await;
            let Ok(connection) = connected else { continue };
            if hello(&connection, &self.network, self.model, HELLO_TIMEOUT).await.is_ok() {
                return Some(connection);
            }
        }
        // Behind a home router, or from behind one: over the control plane.
        let connection = self.discovery.connect_data(id, advert.circuits.clone(), CONNECT_TIMEOUT).await.ok()?;
        hello(&connection, &self.network, self.model, HELLO_TIMEOUT).await.ok()?;
        Some(connection)
    }
}

impl Peer {
    /// One chunk: at most `length` bytes from `offset`, and the length of the whole.
    async fn chunk(&self, wanted: Wanted, offset: u64, length: u64) -> Result<(u64, Bytes), SourceError> {
        let request_id = self.requests.fetch_add(1, Ordering::Relaxed);
        let length = length.min(u64::from(MAX_CHUNK_BYTES)) as u32;
        let fetch = Frame::Fetch(Fetch { request_id, model: self.model, wanted, offset, length });
        match self.connection.call(&fetch, CHUNK_TIMEOUT).await {
            Ok(Frame::Chunk(chunk)) => Ok((chunk.total, chunk.body)),
            Ok(Frame::Refusal(refusal)) => Err(match refusal.code {
                RefusalCode::NotHosted => SourceError::NotHere,
                RefusalCode::Busy => {
                    SourceError::Busy { retry_after: Duration::from_millis(refusal.retry_after_ms.max(20).into()) }
                }
                RefusalCode::Draining => SourceError::Useless("it is leaving".into()),
                code => SourceError::Failed(format!("refused ({code:?}): {}", refusal.message)),
            }),
            Ok(frame) => Err(SourceError::Useless(format!("it answered with a {:?} frame", frame.kind()))),
            Err(error) => Err(SourceError::Failed(error.to_string())),
        }
    }

    async fn manifest(&self) -> Result<SignedManifest, String> {
        let (total, first) =
            self.chunk(Wanted::Manifest, 0, u64::from(MAX_CHUNK_BYTES)).await.map_err(|e| e.to_string())?;
        if total > MAX_MANIFEST_BYTES as u64 {
            return Err(format!("its manifest has {total} bytes"));
        }
        let mut bytes = first.to_vec();
        while (bytes.len() as u64) < total {
            let at = bytes.len() as u64;
            let (again, part) = self.chunk(Wanted::Manifest, at, total - at).await.map_err(|e| e.to_string())?;
            if again != total {
                return Err("its manifest changed while it was read".into());
            }
            bytes.extend_from_slice(&part);
        }
        let manifest = SignedManifest::decode(&bytes).map_err(|e| e.to_string())?;
        if manifest.id() != self.model {
            return Err(format!("it gave the manifest of model {}", manifest.id()));
        }
        Ok(manifest)
    }
}

impl Source for Peer {
    fn name(&self) -> String {
        self.id.to_string()
    }

    fn parallel(&self) -> usize {
        PARALLEL
    }

    fn read<'a>(&'a self, item: &'a Item, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            let wanted = Wanted::Blob(item.blob.hash);
            let (total, body) = self.chunk(wanted, range.start, range.end - range.start).await?;
            if total != item.blob.bytes {
                return Err(SourceError::Useless(format!("it says that {} has {total} bytes", item.what)));
            }
            Ok(body)
        }
        .boxed()
    }

    fn tree<'a>(&'a self, item: &'a Item) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>> {
        async move {
            let expected = group_count(item.blob.bytes) * CHAINING_VALUE_BYTES;
            let mut list = Vec::new();
            while (list.len() as u64) < expected {
                let at = list.len() as u64;
                let (total, part) = self.chunk(Wanted::Tree(item.blob.hash), at, expected - at).await?;
                if total != expected || part.is_empty() {
                    return Err(SourceError::Useless(format!(
                        "it has {total} bytes of chaining values for {}",
                        item.what
                    )));
                }
                list.extend_from_slice(&part);
            }
            Ok(Some(list.into()))
        }
        .boxed()
    }
}
