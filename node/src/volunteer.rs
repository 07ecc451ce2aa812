//! A volunteer: joins a network, loads experts, serves them, and leaves in good order.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hanse_model::{Checkpoint, LoadError, compute_pool};
use hanse_protocol::discovery::keys::{DEFAULT_NETWORK, ProviderKey};
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, DiscoveryError, ReachConfig, Reachability};
use hanse_protocol::{
    Advert, AdvertError, BindError, DataEndpoint, HostedError, HostedExperts, Identity, MAX_CIRCUITS,
    MAX_DATA_ADDRESSES, ModelId, Multiaddr, PeerId, SignedAdvert, WireDtype,
};
use hanse_router::client::layout_of;
use hanse_router::network::hosted_models;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::batcher::Batcher;
use crate::counters::{Counters, Counts};
use crate::experts_spec::{ExpertsSpec, ExpertsSpecError};
use crate::placement::{self, ExpertTable, View};
use crate::server::Server;
use crate::store::ExpertStore;

/// An advert is believed this long after it was made.
const ADVERT_LIFETIME: Duration = Duration::from_secs(120);
/// A new advert is made this often: several within one life time.
const ADVERT_INTERVAL: Duration = Duration::from_secs(20);
/// (row, expert) pairs that may wait to be computed.
const MAX_QUEUED_PAIRS: usize = 16 * 1024;
/// How long a leaving volunteer goes on answering: clients read its advert every few seconds.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long calls in progress may take to end once no new ones are accepted.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the network before choosing experts for `--memory`.
const LOOK_AROUND: Duration = Duration::from_secs(10);

/// Which experts to host.
#[derive(Debug, Clone)]
pub enum Hosting {
    /// These.
    Experts(ExpertsSpec),
    /// As many as fit into so many bytes, rarest in the network first.
    MemoryBytes(u64),
}

/// How a volunteer takes part.
#[derive(Debug, Clone)]
pub struct VolunteerConfig {
    /// The network's name.
    pub network: String,
    /// Control-plane addresses to listen on.
    pub listen: Vec<Multiaddr>,
    /// The data plane's address; `None` takes a free UDP port on the address of the first of `listen`.
    pub data_listen: Option<SocketAddr>,
    /// Members to join through; none for the first member of a network.
    pub bootstrap: Vec<Multiaddr>,
    /// Whether to look for members on the local network by multicast DNS.
    pub mdns: bool,
    /// How to deal with home routers.
    pub reach: ReachConfig,
    /// Which experts to host.
    pub hosting: Hosting,
    /// Computing threads; 0 takes one per core.
    pub threads: usize,
}

impl Default for VolunteerConfig {
    /// All experts, on free loopback ports, alone.
    fn default() -> Self {
        let loopback = Multiaddr::from(Ipv4Addr::LOCALHOST);
        let quic = loopback
            .with(hanse_protocol::multiaddr::Protocol::Udp(0))
            .with(hanse_protocol::multiaddr::Protocol::QuicV1);
        Self {
            network: DEFAULT_NETWORK.to_owned(),
            listen: vec![quic],
            data_listen: None,
            bootstrap: Vec::new(),
            mdns: false,
            reach: ReachConfig::default(),
            hosting: Hosting::Experts(ExpertsSpec::All),
            threads: 0,
        }
    }
}

/// Why a volunteer did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolunteerError {
    /// The control plane did not start.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The data plane did not start.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The experts wanted are not in the model.
    #[error(transparent)]
    Spec(#[from] ExpertsSpecError),
    /// Not even one expert fits.
    #[error("{budget_bytes} bytes hold no expert of this model: one takes {expert_bytes} bytes")]
    TooLittleMemory {
        /// The memory given.
        budget_bytes: u64,
        /// The size of the model's smallest expert.
        expert_bytes: u64,
    },
    /// An expert's weights cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model has more layers or experts than an advert can say.
    #[error(transparent)]
    Hosted(#[from] HostedError),
    /// The advert cannot be made.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// Threads could not be started, or a task died.
    #[error("cannot start computing: {0}")]
    Compute(String),
}

/// A running volunteer. Dropped without [`Volunteer::shutdown`] it vanishes rudely, as a crash would.
#[derive(Debug)]
pub struct Volunteer {
    peer_id: PeerId,
    model: ModelId,
    discovery: Discovery,
    endpoint: DataEndpoint,
    server: Arc<Server>,
    announcer: Arc<Announcer>,
    serving: CancellationToken,
    announcing: CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
}

impl Volunteer {
    /// Joins, loads the experts, and returns when they are served and announced.
    ///
    /// `progress` is told how many experts of how many are loaded.
    ///
    /// # Errors
    /// See [`VolunteerError`]; after an error nothing is left running.
    pub async fn start(
        identity: &Identity,
        checkpoint: &Checkpoint,
        model: ModelId,
        config: VolunteerConfig,
        progress: impl Fn(usize, usize) + Send + 'static,
    ) -> Result<Self, VolunteerError> {
        let discovery = Discovery::start(
            identity,
            DiscoveryConfig {
                network: config.network.clone(),
                listen: config.listen.clone(),
                bootstrap: config.bootstrap.clone(),
                mdns: config.mdns,
                reach: config.reach.clone(),
            },
        )
        .await?;
        match Self::start_serving(identity, checkpoint, model, &config, discovery.clone(), progress).await {
            Ok(volunteer) => Ok(volunteer),
            Err(error) => {
                discovery.shutdown().await;
                Err(error)
            }
        }
    }

    async fn start_serving(
        identity: &Identity,
        checkpoint: &Checkpoint,
        model: ModelId,
        config: &VolunteerConfig,
        discovery: Discovery,
        progress: impl Fn(usize, usize) + Send + 'static,
    ) -> Result<Self, VolunteerError> {
        let wanted = choose(checkpoint, model, config, &discovery).await?;
        let (source, threads) = (checkpoint.clone(), config.threads);
        let loaded = tokio::task::spawn_blocking(move || {
            let count = wanted.len();
            let store = ExpertStore::load(&source, &wanted, |done| progress(done, count))?;
            let pool = compute_pool(threads).map_err(|e| VolunteerError::Compute(e.to_string()))?;
            Ok::<_, VolunteerError>((Arc::new(store), Arc::new(pool)))
        });
        let (store, pool) = loaded.await.map_err(|e| VolunteerError::Compute(e.to_string()))??;

        let endpoint =
            DataEndpoint::bind(identity, config.data_listen.unwrap_or_else(|| default_data_address(&config.listen)))?;
        let bound = endpoint.local_addr().map_err(|e| VolunteerError::Compute(e.to_string()))?;
        let batcher = Batcher::start(store.clone(), pool, MAX_QUEUED_PAIRS)
            .map_err(|e| VolunteerError::Compute(e.to_string()))?;
        let server = Arc::new(Server {
            network: config.network.clone(),
            model,
            store: store.clone(),
            top_k: checkpoint.spec().moe_layers().map(|(_, moe)| moe.top_k as u32).max().unwrap_or(1),
            batcher,
            counters: Counters::default(),
            draining: AtomicBool::new(false),
        });
        let announcer = Arc::new(Announcer {
            identity: identity.clone(),
            discovery: discovery.clone(),
            server: server.clone(),
            hosted: store.hosted()?,
            layers: layout_of(checkpoint.spec()).layers,
            bound,
        });
        let (serving, announcing) = (CancellationToken::new(), CancellationToken::new());
        let serve = AbortOnDropHandle::new(tokio::spawn(server.clone().run(
            endpoint.clone(),
            discovery.clone(),
            serving.clone(),
        )));
        announcer.announce().await?;
        let announce = AbortOnDropHandle::new(tokio::spawn(announcer.clone().run(announcing.clone())));
        Ok(Self {
            peer_id: identity.peer_id(),
            model,
            discovery,
            endpoint,
            server,
            announcer,
            serving,
            announcing,
            tasks: vec![serve, announce],
        })
    }

    /// Its peer id.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.peer_id
    }

    /// The id of the model whose experts it hosts.
    #[must_use]
    pub fn model(&self) -> ModelId {
        self.model
    }

    /// Control-plane addresses, each of which may be given to others as a bootstrap address.
    #[must_use]
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.discovery.addresses()
    }

    /// How others reach it at present.
    #[must_use]
    pub fn reachability(&self) -> Reachability {
        self.discovery.reach().borrow().reachability
    }

    /// Where the data plane can be dialled.
    #[must_use]
    pub fn data_addresses(&self) -> Vec<SocketAddr> {
        self.announcer.data_addresses()
    }

    /// The experts it holds.
    #[must_use]
    pub fn store(&self) -> &ExpertStore {
        &self.server.store
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.server.counters.counts()
    }

    /// Leaves in good order: says that it drains, lets calls in progress end, closes. Returns what it did in all.
    pub async fn shutdown(self) -> Counts {
        self.server.draining.store(true, Ordering::Relaxed);
        self.announcing.cancel();
        if self.announcer.announce().await.is_ok() {
            tokio::time::sleep(DRAIN_TIME).await;
        }
        self.serving.cancel();
        for task in self.tasks {
            // What has not ended by then is cut off below.
            let _ = tokio::time::timeout(STOP_TIMEOUT, task).await;
        }
        self.endpoint.close().await;
        self.discovery.shutdown().await;
        self.server.counters.counts()
    }
}

/// The experts to load.
async fn choose(
    checkpoint: &Checkpoint,
    model: ModelId,
    config: &VolunteerConfig,
    discovery: &Discovery,
) -> Result<Vec<(u32, u32)>, VolunteerError> {
    let layout = layout_of(checkpoint.spec());
    let budget_bytes = match &config.hosting {
        Hosting::Experts(spec) => return Ok(spec.resolve(&layout, checkpoint.spec().layers.len() as u32)?),
        Hosting::MemoryBytes(bytes) => *bytes,
    };
    let mut adverts = BTreeMap::new();
    if !config.bootstrap.is_empty() || config.mdns {
        // Alone in the network there is nothing to look at, and every expert is equally rare.
        if discovery.wait_connected(LOOK_AROUND).await.is_ok() {
            adverts = hosted_models(discovery).await;
        } else {
            tracing::warn!("nobody answered at the bootstrap addresses; choosing experts as the first member");
        }
    }
    let own = discovery.peer_id();
    let others = adverts.remove(&model).unwrap_or_default();
    let others = others.iter().filter(|(peer, _)| *peer != own).map(|(_, advert)| advert);
    let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis());
    let table = Arc::new(ExpertTable::of(checkpoint));
    let view = View::of(table.clone(), others, now.unwrap_or(u64::MAX));
    let seed = own.to_bytes().iter().fold(0u64, |seed, &byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let chosen = placement::choose(&view, budget_bytes, seed);
    if chosen.is_empty() {
        let expert_bytes = table.smallest();
        return Err(VolunteerError::TooLittleMemory { budget_bytes, expert_bytes });
    }
    Ok(chosen)
}

/// A free port on the address of the first control-plane listener that has one.
fn default_data_address(listen: &[Multiaddr]) -> SocketAddr {
    let ip = listen.iter().find_map(ip_of).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    SocketAddr::new(ip, 0)
}

fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    use hanse_protocol::multiaddr::Protocol;
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    })
}

/// Keeps the volunteer's advert fresh.
#[derive(Debug)]
struct Announcer {
    identity: Identity,
    discovery: Discovery,
    server: Arc<Server>,
    hosted: HostedExperts,
    layers: BTreeMap<u32, u32>,
    bound: SocketAddr,
}

impl Announcer {
    async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let mut reach = self.discovery.reach();
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(ADVERT_INTERVAL) => {}
                Ok(()) = reach.changed() => {}
            }
            if let Err(error) = self.announce().await {
                tracing::warn!(%error, "advert not renewed");
            }
        }
    }

    /// The bound address, or one address per network interface if it is bound to all; loopback last, since only members on
    /// this machine reach it.
    fn data_addresses(&self) -> Vec<SocketAddr> {
        let mut ips = vec![self.bound.ip()];
        if self.bound.ip().is_unspecified() {
            let accepts = |ip: &IpAddr| ip.is_ipv4() || self.bound.is_ipv6();
            ips = self.discovery.addresses().iter().filter_map(ip_of).filter(accepts).collect();
            // Behind a router that leads to this machine, that router's address is not among its own.
            ips.extend(self.discovery.reach().borrow().public_ips.iter().filter(|ip| accepts(ip)));
            ips.sort_by_key(|ip| (ip.is_loopback(), *ip));
            ips.dedup();
        }
        ips.into_iter().take(MAX_DATA_ADDRESSES).map(|ip| SocketAddr::new(ip, self.bound.port())).collect()
    }

    async fn announce(&self) -> Result<(), VolunteerError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let batcher = &self.server.batcher;
        let draining = self.server.draining.load(Ordering::Relaxed);
        let reach = self.discovery.reach().borrow().clone();
        let load = batcher.queued_pairs().saturating_mul(1000) / batcher.max_pairs().max(1);
        let advert = Advert {
            model: self.server.model,
            hosted: self.hosted.clone(),
            layers: self.layers.clone(),
            wire_dtypes: WireDtype::ALL.to_vec(),
            data_addresses: self.data_addresses(),
            capacity_rows: u32::try_from(batcher.max_pairs()).unwrap_or(u32::MAX),
            load_permille: load.min(1000) as u16,
            draining,
            // Rises also over a restart, as long as the clock does not go back.
            sequence: millis(now),
            expires_unix_ms: millis(now + ADVERT_LIFETIME),
            popularity: Vec::new(),
            loading: HostedExperts::new(),
            reachability: reach.reachability,
            circuits: reach.circuits.into_iter().take(MAX_CIRCUITS).collect(),
        };
        let mut keys = Vec::new();
        if !draining {
            keys = ProviderKey::covering(self.server.model, self.server.store.layers());
            keys.push(ProviderKey::volunteers());
        }
        let signed = SignedAdvert::sign(&advert, &self.identity)?;
        self.discovery
            .announce(vec![(self.server.model, signed)], keys)
            .await
            .map_err(|e| VolunteerError::Compute(e.to_string()))
    }
}
