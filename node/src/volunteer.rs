//! A volunteer: joins a network, loads experts, serves them, and leaves in good order.

mod announcer;
mod config;
mod error;
mod host;
mod neighbours;
mod opener;
mod preview;
mod shard;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_model::{Checkpoint, Device, DeviceChoice};
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, Reachability};
use hanse_protocol::{DataEndpoint, Draining, Identity, ModelId, Multiaddr, PeerId, data_runtime};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::batcher::Batcher;
use crate::counters::{Counters, Counts, Demand};
use crate::giving::Giving;
use crate::owner::Bandwidth;
use crate::server::{Pause, Server};
use crate::store::{ExpertStore, Lent};
use announcer::{Announcer, DataAddresses, Stored};
use config::default_data_address;
use host::{Host, MoveCounts};
use neighbours::Neighbours;
use opener::{Opener, open_devices};
use shard::Shard;

pub use announcer::{ADVERT_INTERVAL, ADVERT_LIFETIME};
pub use config::{Hosting, VolunteerConfig};
pub use error::VolunteerError;
pub use host::Moves;
pub use preview::{Preview, preview};

/// (row, expert) pairs that may wait to be computed.
const MAX_QUEUED_PAIRS: usize = 16 * 1024;
/// How long a leaving volunteer goes on answering: clients read its advert every few seconds.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// How long calls in progress may take to end once no new ones are accepted.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

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
