//! A volunteer: joins a network, loads experts, serves them, and leaves in good order.

mod announcer;
mod host;
mod neighbours;
mod opener;
mod preview;
mod shard;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_model::{Checkpoint, Device, DeviceChoice, DeviceError, LoadError, OpenError};
use hanse_protocol::discovery::keys::DEFAULT_NETWORK;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, DiscoveryError, ReachConfig, Reachability};
use hanse_protocol::{
    AdvertError, BindError, DataEndpoint, Draining, HostedError, Identity, ModelId, Multiaddr, PeerId, data_runtime,
};
use hanse_router::weights::{FetchError, RemoteModel, Shelf};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::batcher::Batcher;
use crate::counters::{Counters, Counts, Demand};
use crate::experts_spec::{ExpertsSpec, ExpertsSpecError};
use crate::giving::Giving;
use crate::owner::Bandwidth;
use crate::placement::Pace;
use crate::server::{Pause, Server};
use crate::store::{ExpertStore, Lent};
use announcer::{Announcer, DataAddresses, Stored};
use host::{Host, MoveCounts};
use neighbours::Neighbours;
use opener::{Opener, open_devices};
use shard::Shard;

pub use announcer::{ADVERT_INTERVAL, ADVERT_LIFETIME};
pub use host::Moves;
pub use preview::{Preview, preview};

/// (row, expert) pairs that may wait to be computed.
const MAX_QUEUED_PAIRS: usize = 16 * 1024;
/// Ten minutes of calls say more about what is wanted than the last question.
const DEMAND_HALF_LIFE: Duration = Duration::from_secs(600);
/// How long a leaving volunteer goes on answering: clients read its advert every few seconds.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long calls in progress may take to end once no new ones are accepted.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Which experts to host.
#[derive(Debug, Clone)]
pub enum Hosting {
    /// These.
    Experts(ExpertsSpec),
    /// As many as fit into so many bytes, and onto the devices, rarest in the network first.
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
    /// Data-plane addresses to announce in place of the bound ones: where others reach this node through a port forwarding.
    pub advertise: Vec<SocketAddr>,
    /// Members to join through; none for the first member of a network.
    pub bootstrap: Vec<Multiaddr>,
    /// Whether to look for members on the local network by multicast DNS.
    pub mdns: bool,
    /// How to deal with home routers.
    pub reach: ReachConfig,
    /// Which experts to host.
    pub hosting: Hosting,
    /// What holds experts and computes them. Several devices are one volunteer.
    pub device: DeviceChoice,
    /// Computing threads, where the processor computes; 0 takes one per core.
    pub threads: usize,
    /// With [`Hosting::MemoryBytes`]: how fast capacity moves to where it is missed.
    pub pace: Pace,
    /// Bytes of answers and weights sent in a second at most; `None` for as many as the line takes.
    pub max_bandwidth: Option<u64>,
    /// In this time half of the demand for an expert is forgotten.
    pub demand_half_life: Duration,
    /// Keep the files of hosted experts in the cache, so that experts of a device that was lent can be loaded again.
    pub keep_files: bool,
    /// What fetches the checkpoint's experts; `None` if it is a folder. Then they are fetched several at a time, ahead of being
    /// loaded.
    pub remote: Option<RemoteModel>,
    /// The model's manifest and weights, to be given to those who ask for them; `None` gives out nothing.
    pub shelf: Option<Arc<Shelf>>,
    /// Bytes of weights given out per second; `None` for as many as answers leave of `max_bandwidth`.
    pub give_bytes_per_second: Option<u64>,
}

impl Default for VolunteerConfig {
    /// All experts, computed by the processor, on free loopback ports, alone.
    fn default() -> Self {
        let loopback = Multiaddr::from(Ipv4Addr::LOCALHOST);
        let quic = loopback
            .with(hanse_protocol::multiaddr::Protocol::Udp(0))
            .with(hanse_protocol::multiaddr::Protocol::QuicV1);
        Self {
            network: DEFAULT_NETWORK.to_owned(),
            listen: vec![quic],
            data_listen: None,
            advertise: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            reach: ReachConfig::default(),
            hosting: Hosting::Experts(ExpertsSpec::All),
            device: DeviceChoice::Cpu,
            threads: 0,
            pace: Pace::default(),
            max_bandwidth: None,
            demand_half_life: DEMAND_HALF_LIFE,
            keep_files: false,
            remote: None,
            shelf: None,
            give_bytes_per_second: None,
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
    #[error("{budget_bytes} bytes hold no expert of this model: the smallest takes {expert_bytes} bytes")]
    TooLittleMemory {
        /// The memory given.
        budget_bytes: u64,
        /// The size of the model's smallest expert.
        expert_bytes: u64,
    },
    /// A device that was named cannot be used.
    #[error(transparent)]
    Device(#[from] OpenError),
    /// No device has room to compute.
    #[error("nothing can be computed: {0}")]
    Unusable(#[from] DeviceError),
    /// Not even one of the experts wanted fits onto the devices, or all of these failed.
    #[error("no expert fits on {devices}: see `hanse doctor` for what is free there")]
    NoRoom {
        /// Their names.
        devices: String,
    },
    /// An expert's weights cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Some experts that nobody gives, or a cache that cannot take them. Those that could be fetched are hosted.
    #[error(transparent)]
    Fetch(#[from] FetchError),
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
    moves: Arc<MoveCounts>,
    opener: Arc<Opener>,
    loaded: Option<oneshot::Receiver<Result<(), VolunteerError>>>,
    serving: CancellationToken,
    announcing: CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
}

impl Volunteer {
    /// Joins, loads the experts, and returns when all of them are served and announced: [`Self::join`] and then [`Self::loaded`].
    ///
    /// # Errors
    /// See [`VolunteerError`]; after an error nothing is left running.
    pub async fn start(
        identity: &Identity,
        checkpoint: &Checkpoint,
        model: ModelId,
        config: VolunteerConfig,
        progress: impl Fn(usize, usize) + Send + Sync + 'static,
    ) -> Result<Self, VolunteerError> {
        let mut volunteer = Self::join(identity, checkpoint, model, config, progress).await?;
        match volunteer.loaded().await {
            Ok(()) => Ok(volunteer),
            Err(error) => {
                volunteer.abandon().await;
                Err(error)
            }
        }
    }

    /// Joins and begins to load experts; each is served and announced as soon as it is there.
    ///
    /// `progress` is told how many experts of how many are loaded.
    ///
    /// # Errors
    /// See [`VolunteerError`]; after an error nothing is left running. What is wrong with the experts wanted is told by
    /// [`Self::loaded`].
    pub async fn join(
        identity: &Identity,
        checkpoint: &Checkpoint,
        model: ModelId,
        config: VolunteerConfig,
        progress: impl Fn(usize, usize) + Send + Sync + 'static,
    ) -> Result<Self, VolunteerError> {
        let opener = Arc::new(Opener::new(&config, checkpoint));
        let devices = open_devices(&opener, &config.device).await?;
        let discovery = Discovery::start(
            identity,
            DiscoveryConfig {
                network: config.network.clone(),
                listen: config.listen.clone(),
                bootstrap: config.bootstrap.clone(),
                mdns: config.mdns,
                reach: config.reach.clone(),
                ..DiscoveryConfig::default()
            },
        )
        .await?;
        match Self::serve(identity, checkpoint, model, config, (opener, devices), discovery.clone(), progress) {
            Ok(volunteer) => Ok(volunteer),
            Err(error) => {
                discovery.shutdown().await;
                Err(error)
            }
        }
    }

    fn serve(
        identity: &Identity,
        checkpoint: &Checkpoint,
        model: ModelId,
        config: VolunteerConfig,
        (opener, devices): (Arc<Opener>, Vec<Arc<dyn Device>>),
        discovery: Discovery,
        progress: impl Fn(usize, usize) + Send + Sync + 'static,
    ) -> Result<Self, VolunteerError> {
        let failed = |error: &dyn std::fmt::Display| VolunteerError::Compute(error.to_string());
        let endpoint =
            DataEndpoint::bind(identity, config.data_listen.unwrap_or_else(|| default_data_address(&config.listen)))?;
        let bound = endpoint.local_addr().map_err(|e| failed(&e))?;
        let shard = Arc::new(Shard::new(checkpoint.clone(), config.remote.clone(), devices, config.keep_files));
        let server = Arc::new(Server {
            network: config.network.clone(),
            model,
            store: shard.store().clone(),
            top_k: checkpoint.spec().moe_layers().map(|(_, moe)| moe.top_k as u32).max().unwrap_or(1),
            batcher: Batcher::start(shard.store().clone(), MAX_QUEUED_PAIRS).map_err(|e| failed(&e))?,
            counters: Counters::default(),
            demand: Demand::new(config.demand_half_life, Instant::now()),
            draining: Pause::default(),
            bandwidth: config.max_bandwidth.map(|rate| Bandwidth::new(rate, Instant::now())),
            giving: config.shelf.clone().map(|shelf| Giving::new(shelf, config.give_bytes_per_second)),
        });
        let data = DataAddresses { bound, advertised: config.advertise.clone() };
        let announcer = Arc::new(Announcer::new(
            identity.clone(),
            discovery.clone(),
            server.clone(),
            shard,
            Stored::of(checkpoint),
            data,
        ));
        let (serving, announcing) = (CancellationToken::new(), CancellationToken::new());
        let serve = server.clone().run(endpoint.clone(), discovery.clone(), serving.clone());
        let announce = announcer.clone().run(announcing.clone());
        let moves = Arc::new(MoveCounts::default());
        let hosting = Host {
            announcer: announcer.clone(),
            neighbours: Neighbours::new(discovery.clone(), model),
            moves: moves.clone(),
            layers: checkpoint.spec().layers.len() as u32,
            config,
            missed: None,
        };
        let (report, loaded) = oneshot::channel();
        let host = hosting.run(progress, report, announcing.clone());
        Ok(Self {
            peer_id: identity.peer_id(),
            model,
            discovery,
            endpoint,
            server,
            announcer,
            moves,
            opener,
            loaded: Some(loaded),
            serving,
            announcing,
            tasks: [data_runtime().spawn(serve), tokio::spawn(announce), tokio::spawn(host)]
                .map(AbortOnDropHandle::new)
                .into(),
        })
    }

    /// Waits until everything chosen is served and announced.
    ///
    /// # Errors
    /// Why it never will be; told once.
    pub async fn loaded(&mut self) -> Result<(), VolunteerError> {
        let Some(loaded) = &mut self.loaded else { return Ok(()) };
        let outcome = loaded.await.unwrap_or_else(|_| Err(VolunteerError::Compute("loading was cut off".into())));
        self.loaded = None;
        outcome
    }

    /// Ends at once, without telling anyone.
    async fn abandon(self) {
        drop(self.tasks);
        self.endpoint.close().await;
        self.discovery.shutdown().await;
    }

    /// Refuses new calls and says so in its advert, and why, until [`Self::resume`]; calls in progress are finished.
    ///
    /// # Errors
    /// The advert cannot be made; new calls are refused all the same.
    pub async fn pause(&self, why: Draining) -> Result<(), VolunteerError> {
        self.server.draining.set(Some(why));
        self.announcer.announce().await
    }

    /// Takes calls again after [`Self::pause`].
    ///
    /// # Errors
    /// The advert cannot be made; calls are taken all the same.
    pub async fn resume(&self) -> Result<(), VolunteerError> {
        self.server.draining.set(None);
        self.announcer.announce().await
    }

    /// Whether it refuses calls at present.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.announcer.refuses()
    }

    /// Gives a device up, with all that lies on it, for another program: its memory is free when this returns, unless a pass is
    /// computed for longer than `within`. Calls that need it are refused. `None` if it is not used, or has failed.
    ///
    /// Dropped, the device is given up all the same.
    ///
    /// # Errors
    /// No thread for it.
    pub async fn lend(&self, device: &str, within: Duration) -> Result<Option<Lent>, VolunteerError> {
        let (store, device) = (self.server.store.clone(), device.to_owned());
        let lent = tokio::task::spawn_blocking(move || store.lend(&device, within)).await;
        lent.map_err(|e| VolunteerError::Compute(e.to_string()))
    }

    /// What opens a device anew that was lent, and has its experts loaded again. It blocks for as long as the device takes to open.
    pub fn taking_back(&self, device: &str) -> impl FnOnce() -> Result<Arc<dyn Device>, VolunteerError> + Send + use<> {
        let (shard, opener, device) = (self.announcer.shard.clone(), self.opener.clone(), device.to_owned());
        move || {
            let choice: DeviceChoice = device.parse().map_err(|e| VolunteerError::Compute(format!("{device}: {e}")))?;
            let opened = opener.open(&choice)?.into_iter().next();
            let opened = opened.ok_or_else(|| VolunteerError::Compute(format!("{device} is not there any more")))?;
            shard.take_back(opened.clone());
            Ok(opened)
        }
    }

    /// What it moved to keep the network in balance.
    #[must_use]
    pub fn moves(&self) -> Moves {
        self.moves.moves()
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

    /// Where the data plane listens, whatever is announced.
    #[must_use]
    pub fn data_listen(&self) -> SocketAddr {
        self.announcer.data.bound
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
        self.server.draining.set(Some(Draining::Leaving));
        self.announcing.cancel();
        if self.announcer.announce().await.is_ok() {
            tokio::time::sleep(DRAIN_TIME).await;
        }
        self.serving.cancel();
        let last = tokio::time::Instant::now() + STOP_TIMEOUT;
        for task in self.tasks {
            // What has not ended by then is cut off below.
            let _ = tokio::time::timeout_at(last, task).await;
        }
        self.endpoint.close().await;
        self.discovery.shutdown().await;
        self.server.counters.counts()
    }
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
