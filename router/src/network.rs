//! The experts of one model as a network: joined once, called by many requests.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hanse_protocol::discovery::keys::{DEFAULT_NETWORK, ProviderKey};
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, DiscoveryError, LookupError};
use hanse_protocol::{BindError, Combine, DataEndpoint, Identity, ModelId, Multiaddr, Precision, WireDtype};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::directory::{Directory, ExpertLayout, Missing};
use crate::dispatch::{HedgeBudget, PassTrace, Tally, Tracer};
use crate::fallback::{Fallback, Orphans};
use crate::membership::Membership;
use crate::precision::{Forms, PrecisionPolicy};
use crate::resident::Resident;
use crate::search::PeerSearch;

/// How long a client that can compute missing experts itself waits for peers that host them.
const JOIN_GRACE: Duration = Duration::from_secs(3);

/// How a client joins a network and calls its peers.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The network's name, see [`DiscoveryConfig::network`].
    pub network: String,
    /// Members to join through.
    pub bootstrap: Vec<Multiaddr>,
    /// Whether to look for members on the local network by multicast DNS as well.
    pub mdns: bool,
    /// How hidden states are encoded on the wire.
    pub wire: WireDtype,
    /// Who adds the experts' rows up; `None` takes [`WireDtype::default_combine`].
    pub combine: Option<Combine>,
    /// How long joining may take: finding peers for every expert and connecting to them.
    pub join_timeout: Duration,
    /// The longest that one call may take before it counts as failed.
    pub call_timeout: Duration,
    /// How long to wait for a replica to come back when an expert has none, before the fallback or giving up.
    pub replica_patience: Duration,
    /// Who computes experts that have had no replica for so long; nobody by default. With a fallback the network may be joined
    /// while some experts have no peer.
    pub fallback: Option<Arc<dyn Fallback>>,
    /// Which experts it accepts that are stored in fewer bits than the model was published in; none by default.
    pub precision: PrecisionPolicy,
    /// Experts that this client holds itself; none by default. They are not asked of peers where the client adds up, and draft.
    pub resident: Option<Arc<Resident>>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            network: DEFAULT_NETWORK.to_owned(),
            bootstrap: Vec::new(),
            mdns: false,
            wire: WireDtype::F32,
            combine: None,
            join_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(20),
            replica_patience: Duration::from_secs(10),
            fallback: None,
            precision: PrecisionPolicy::Exact,
            resident: None,
        }
    }
}

/// Why a network could not be joined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Neither bootstrap addresses nor mDNS: there is no way to find anyone.
    #[error("no bootstrap address given: name at least one member of the network with --bootstrap")]
    NoBootstrap,
    /// The control plane did not start.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The data plane did not start.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Nobody answered at the bootstrap addresses. Check the addresses, or whether the member still runs.
    #[error("no peer reachable{}: {reason}", addresses_text(.addresses))]
    Unreachable {
        /// The addresses that were tried.
        addresses: Vec<Multiaddr>,
        /// For how long, and what is wrong with each of them.
        reason: Box<LookupError>,
    },
    /// The network was joined but nobody hosts this model; these are the models that are hosted.
    #[error("no peer hosts model {ours}; {}", others_text(.others))]
    OtherModels {
        /// The id of the model asked for.
        ours: ModelId,
        /// The ids of the models that reachable peers host.
        others: Vec<ModelId>,
    },
    /// Peers were found, but nobody hosts some experts.
    #[error("no peer hosts these experts: {missing}{}", variants_text(.variants))]
    Incomplete {
        /// The experts.
        missing: Missing,
        /// How peers store experts that the client does not accept.
        variants: Vec<Precision>,
    },
}

fn addresses_text(addresses: &[Multiaddr]) -> String {
    let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    if names.is_empty() { String::new() } else { format!(" at {}", names.join(" or ")) }
}

fn variants_text(variants: &[Precision]) -> String {
    if variants.is_empty() {
        return String::new();
    }
    let names: Vec<String> = variants.iter().map(ToString::to_string).collect();
    format!("; peers host experts in {}, which --precision any accepts", names.join(", "))
}

fn others_text(others: &[ModelId]) -> String {
    if others.is_empty() {
        return "the members that were reached host nothing".to_owned();
    }
    let names: Vec<String> = others.iter().map(ToString::to_string).collect();
    format!("its peers host {}: the weights or config.json differ from yours", names.join(", "))
}

/// A joined network: the peers that host one model's experts, found and kept connected in the background.
#[derive(Debug)]
pub struct ExpertNetwork {
    pub(crate) config: NetworkConfig,
    pub(crate) model: ModelId,
    pub(crate) directory: Arc<Directory>,
    request_ids: AtomicU64,
    pub(crate) hedges: HedgeBudget,
    pub(crate) orphans: Orphans,
    pub(crate) tally: Tally,
    pub(crate) tracer: Tracer,
    /// Differs between clients, so that they do not all choose the same among equal peers.
    pub(crate) salt: u64,
    discovery: Discovery,
    endpoint: DataEndpoint,
    cancel: CancellationToken,
    _membership: AbortOnDropHandle<()>,
}

impl ExpertNetwork {
    /// Joins, and returns when every expert of `layout` has a connected peer.
    ///
    /// # Errors
    /// See [`JoinError`]; after an error nothing is left running.
    pub async fn join(
        identity: &Identity,
        model: ModelId,
        layout: ExpertLayout,
        config: NetworkConfig,
    ) -> Result<Self, JoinError> {
        let deadline = tokio::time::Instant::now() + config.join_timeout;
        let network = Self::start(identity, model, layout, config).await?;
        network.or_shut_down(network.wait_complete(deadline).await).await?;
        Ok(network)
    }

    /// Joins without waiting for peers that host the model's experts: to see what there is of it.
    ///
    /// # Errors
    /// As [`Self::join`], except that no expert is missed.
    pub async fn watch(
        identity: &Identity,
        model: ModelId,
        layout: ExpertLayout,
        config: NetworkConfig,
    ) -> Result<Self, JoinError> {
        let deadline = tokio::time::Instant::now() + config.join_timeout;
        let network = Self::start(identity, model, layout, config).await?;
        network.or_shut_down(network.wait_reachable(deadline).await).await?;
        Ok(network)
    }

    /// Leaves nothing running after an error.
    async fn or_shut_down(&self, joined: Result<(), JoinError>) -> Result<(), JoinError> {
        if joined.is_err() {
            self.shutdown().await;
        }
        joined
    }

    async fn start(
        identity: &Identity,
        model: ModelId,
        layout: ExpertLayout,
        config: NetworkConfig,
    ) -> Result<Self, JoinError> {
        let discovery = join_control_plane(identity, &config).await?;
        let endpoint = bind_any(identity)?;
        let tally = Tally::new(&layout);
        let forms = (config.precision != PrecisionPolicy::Exact).then(|| Forms::new(model));
        let directory = Arc::new(Directory::new(layout, forms));
        let membership = Arc::new(Membership {
            search: PeerSearch::new(discovery.clone(), model, directory.layout().layers.keys().copied()),
            endpoint: endpoint.clone(),
            directory: directory.clone(),
            network: config.network.clone(),
            wire: config.wire,
            precision: config.precision,
        });
        let cancel = CancellationToken::new();
        let membership = AbortOnDropHandle::new(tokio::spawn(membership.run(cancel.clone())));
        Ok(Self {
            config,
            model,
            directory,
            request_ids: AtomicU64::new(1),
            hedges: HedgeBudget::default(),
            orphans: Orphans::default(),
            tally,
            tracer: Tracer::default(),
            salt: RandomState::new().hash_one(identity.peer_id()),
            discovery,
            endpoint,
            cancel,
            _membership: membership,
        })
    }

    pub(crate) fn next_request_id(&self) -> u64 {
        self.request_ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The id of the model that is called.
    #[must_use]
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Who hosts what, and how fast.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// For each expert of `layer` the number of rows that this client has sent to it; empty for a layer without experts.
    #[must_use]
    pub fn calls(&self, layer: u32) -> Vec<u64> {
        self.tally.of(layer)
    }

    /// A recent forward pass call by call, and how long ago it began. A few passes in a second are written down.
    #[must_use]
    pub fn latest_trace(&self) -> Option<(Duration, PassTrace)> {
        self.tracer.latest().map(|(began, trace)| (began.elapsed(), trace))
    }

    /// Waits until `peers` peers are connected, at most for `timeout`; returns how many are.
    pub async fn wait_for_peers(&self, peers: usize, timeout: Duration) -> usize {
        let connected = || self.directory.peers().iter().filter(|report| report.address.is_some()).count();
        let mut changes = self.directory.subscribe();
        let enough = async { while connected() < peers && changes.changed().await.is_ok() {} };
        // Running out of time is told by the number.
        let _ = tokio::time::timeout(timeout, enough).await;
        connected()
    }

    /// Ends the background tasks and tells every peer that this client has gone; calls in flight fail. Without it peers notice
    /// only when the connection has been silent for long.
    pub async fn shutdown(&self) {
        self.cancel.cancel();
        self.endpoint.close().await;
        self.discovery.shutdown().await;
    }

    async fn wait_complete(&self, deadline: tokio::time::Instant) -> Result<(), JoinError> {
        let Some(_) = &self.config.fallback else { return self.wait_covered(deadline).await };
        let soon = deadline.min(tokio::time::Instant::now() + JOIN_GRACE);
        match self.wait_covered(soon).await {
            Err(JoinError::Incomplete { missing, .. }) => {
                tracing::warn!(%missing, "computing here what no peer hosts");
                Ok(())
            }
            other => other,
        }
    }

    async fn wait_reachable(&self, deadline: tokio::time::Instant) -> Result<(), JoinError> {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        self.discovery.wait_connected(left).await.map_err(|reason| JoinError::Unreachable {
            addresses: self.config.bootstrap.clone(),
            reason: Box::new(reason),
        })
    }

    fn incomplete(&self, missing: Missing) -> JoinError {
        JoinError::Incomplete { missing, variants: self.directory.unwanted() }
    }

    async fn wait_covered(&self, deadline: tokio::time::Instant) -> Result<(), JoinError> {
        self.wait_reachable(deadline).await?;
        let mut changes = self.directory.subscribe();
        // A network that hosts other models only is recognised early, or the wrong folder would look like a slow network.
        let mut check_models = tokio::time::interval(Duration::from_secs(3));
        check_models.tick().await;
        loop {
            let missing = self.directory.missing();
            if missing.is_empty() {
                return Ok(());
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Err(self.incomplete(missing)) },
                _ = check_models.tick() => if self.directory.peers().is_empty() && self.directory.unwanted().is_empty() {
                    let others = hosted_models(&self.discovery).await;
                    if !others.is_empty() && !others.contains_key(&self.model) {
                        return Err(JoinError::OtherModels { ours: self.model, others: others.into_keys().collect() });
                    }
                },
                () = tokio::time::sleep_until(deadline) => {
                    if self.directory.peers().is_empty() && self.directory.unwanted().is_empty() {
                        let others = hosted_models(&self.discovery).await.into_keys().filter(|model| *model != self.model).collect();
                        return Err(JoinError::OtherModels { ours: self.model, others });
                    }
                    return Err(self.incomplete(missing));
                }
            }
        }
    }
}

/// The control plane of a client.
pub(crate) async fn join_control_plane(identity: &Identity, config: &NetworkConfig) -> Result<Discovery, JoinError> {
    if config.bootstrap.is_empty() && !config.mdns {
        return Err(JoinError::NoBootstrap);
    }
    let discovery = DiscoveryConfig {
        network: config.network.clone(),
        listen: Vec::new(),
        bootstrap: config.bootstrap.clone(),
        mdns: config.mdns,
        ..DiscoveryConfig::default()
    };
    Ok(Discovery::start(identity, discovery).await?)
}

/// The data plane's socket of a client: any free port, IPv6 and IPv4 where the system has both.
///
/// # Errors
/// Neither kind of socket can be opened.
pub fn bind_any(identity: &Identity) -> Result<DataEndpoint, BindError> {
    DataEndpoint::bind(identity, SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0))
        .or_else(|_| DataEndpoint::bind(identity, SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)))
}

/// The models that volunteers of the network host, with the valid adverts of each.
pub async fn hosted_models(
    discovery: &Discovery,
) -> BTreeMap<ModelId, Vec<(hanse_protocol::PeerId, hanse_protocol::Advert)>> {
    const LONGEST: Duration = Duration::from_secs(8);
    let mut models: BTreeMap<ModelId, Vec<_>> = BTreeMap::new();
    let search = async {
        let Ok(mut volunteers) = discovery.providers(ProviderKey::volunteers()).await else { return };
        let mut asked = tokio::task::JoinSet::new();
        while let Some(peer) = volunteers.recv().await {
            let discovery = discovery.clone();
            asked.spawn(async move { (peer, discovery.adverts(peer, None).await) });
        }
        while let Some(answer) = asked.join_next().await {
            let Ok((peer, Ok(adverts))) = answer else { continue };
            for advert in adverts {
                models.entry(advert.model).or_default().push((peer, advert));
            }
        }
    };
    let _ = tokio::time::timeout(LONGEST, search).await;
    models
}
