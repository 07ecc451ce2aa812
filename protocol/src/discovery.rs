//! The control plane: finding peers through a libp2p DHT.
//!
//! A volunteer publishes provider records (see [`keys`]) and answers requests for its signed advert; a client
//! looks the records up and asks each provider for its advert. Nothing here is on the hot path of a token.
//!
//! One task owns the libp2p swarm; a [`Discovery`] is a clonable handle that sends it commands over a bounded
//! channel. The task ends when the last handle is dropped or [`Discovery::shutdown`] is called.

mod address;
mod behaviour;
mod bootstrap;
pub mod exchange;
mod gateway;
mod in_process;
pub mod keys;
mod pace;
mod providers;
mod reach;
mod relaying;
mod resolve;
mod retest;
mod task;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::relayed::Lane;
use crate::{Advert, AdvertError, DataConnection, Identity, ModelId, SignedAdvert};
use keys::ProviderKey;

pub use bootstrap::BootstrapFailure;
pub use in_process::Traffic;
pub use reach::{Reach, ReachConfig, ReachPolicy, Reachability};
pub use relaying::RelayLimits;

/// How many commands may wait for the swarm task before senders wait too.
const COMMAND_QUEUE: usize = 64;
/// How many found providers may wait for a slow reader of one look-up.
const PROVIDER_QUEUE: usize = 1024;
/// How many connections may wait for [`Discovery::accept_data`].
const LANE_QUEUE: usize = 256;

/// What a member tells the control plane when it starts.
#[derive(Debug, Clone)]
pub struct DiscoveryConfig {
    /// The network's name; members of differently named networks do not see each other. At most
    /// [`keys::MAX_NETWORK_NAME`] characters of `a-z`, `0-9` and `-`.
    pub network: String,
    /// Multiaddrs to listen on; empty for a client, which then only dials and never serves the DHT.
    pub listen: Vec<Multiaddr>,
    /// Members to join through, as multiaddrs with or without `/p2p/<peer id>`.
    pub bootstrap: Vec<Multiaddr>,
    /// Whether to look for members on the local network by multicast DNS.
    pub mdns: bool,
    /// How to deal with home routers.
    pub reach: ReachConfig,
    /// Where set, there are no sockets: addresses are `/memory/N`, only members of this process that have it set too are reached, and
    /// bytes are counted here. For simulations.
    pub in_process: Option<Arc<Traffic>>,
}

impl Default for DiscoveryConfig {
    /// A client of the default network that knows nobody yet.
    fn default() -> Self {
        Self {
            network: keys::DEFAULT_NETWORK.to_owned(),
            listen: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            reach: ReachConfig::default(),
            in_process: None,
        }
    }
}

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// The network name has other characters than allowed, or too many. The user's fault.
    #[error("network name {0:?} is not allowed: use 1 to {max} characters of a-z, 0-9 and -", max = keys::MAX_NETWORK_NAME)]
    NetworkName(String),
    /// A transport could not be set up.
    #[error("cannot set up the control plane: {0}")]
    Setup(String),
    /// An address cannot be listened on: in use, not ours, or of an unknown kind.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The multiaddr as given.
        address: Multiaddr,
        /// What the operating system or the transport said.
        reason: String,
    },
    /// A bootstrap address names a host that the system cannot resolve.
    #[error("cannot resolve {address}: {reason}")]
    Resolve {
        /// The multiaddr as given.
        address: Multiaddr,
        /// What the resolver said.
        reason: String,
    },
}

/// Why a question to the control plane has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LookupError {
    /// The swarm task has ended.
    #[error("the control plane has stopped")]
    Stopped,
    /// The peer could not be reached or did not answer.
    #[error("{peer} did not answer: {reason}")]
    Unreachable {
        /// Who was asked.
        peer: PeerId,
        /// What went wrong.
        reason: String,
    },
    /// No member of the network could be connected to in time.
    #[error("no member of the network answered within {waited:?}{}", failures_text(.failures))]
    NoBootstrap {
        /// How long.
        waited: Duration,
        /// What is wrong with each bootstrap address, as far as it is known.
        failures: Vec<(Multiaddr, BootstrapFailure)>,
    },
}

fn failures_text(failures: &[(Multiaddr, BootstrapFailure)]) -> String {
    match failures {
        [(_, failure)] => format!(": {failure}"),
        _ => failures.iter().map(|(address, failure)| format!("; at {address}: {failure}")).collect(),
    }
}

/// Milliseconds since 1970, as adverts count time.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A handle on the running control plane.
#[derive(Debug, Clone)]
pub struct Discovery {
    peer_id: PeerId,
    commands: mpsc::Sender<Command>,
    addresses: watch::Receiver<Vec<Multiaddr>>,
    connected: watch::Receiver<usize>,
    published: watch::Receiver<bool>,
    reach: watch::Receiver<Reach>,
    lanes: Arc<Mutex<mpsc::Receiver<Lane>>>,
}

/// What the swarm task tells the handles.
#[derive(Debug)]
pub(crate) struct Reports {
    addresses: watch::Sender<Vec<Multiaddr>>,
    connected: watch::Sender<usize>,
    /// Whether the provider records are with other members.
    published: watch::Sender<bool>,
    reach: watch::Sender<Reach>,
    lanes: mpsc::Sender<Lane>,
}

/// What handles ask of the swarm task.
#[derive(Debug)]
pub(crate) enum Command {
    Announce { adverts: Vec<(Vec<ModelId>, Vec<u8>)>, keys: Vec<ProviderKey> },
    Providers { key: ProviderKey, found: mpsc::Sender<PeerId> },
    Adverts { peer: PeerId, model: Option<ModelId>, answer: oneshot::Sender<Result<Vec<Vec<u8>>, LookupError>> },
    Lane { peer: PeerId, addresses: Vec<Multiaddr>, answer: oneshot::Sender<Result<Lane, LookupError>> },
    Punch { peer: PeerId, circuits: Vec<Multiaddr> },
    BootstrapFailures { answer: oneshot::Sender<Vec<(Multiaddr, BootstrapFailure)>> },
    ForwardData { socket: SocketAddr },
    Shutdown { done: oneshot::Sender<()> },
}

impl Discovery {
    /// Starts the swarm task, listens, and dials the bootstrap addresses (without waiting for them).
    ///
    /// # Errors
    /// A bad network name, an address that cannot be listened on, a host name that does not resolve.
    pub async fn start(identity: &Identity, config: DiscoveryConfig) -> Result<Self, DiscoveryError> {
        let (named, plain) = config.bootstrap.iter().cloned().partition(resolve::is_named);
        let config = DiscoveryConfig { bootstrap: resolve::resolve_all(&config.bootstrap).await?, ..config };
        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let (addresses_out, addresses) = watch::channel(Vec::new());
        let (connected_out, connected) = watch::channel(0);
        let (published_out, published) = watch::channel(false);
        let (reach_out, reach) = watch::channel(Reach::default());
        let (lanes_out, lanes) = mpsc::channel(LANE_QUEUE);
        let reports = Reports {
            addresses: addresses_out,
            connected: connected_out,
            published: published_out,
            reach: reach_out,
            lanes: lanes_out,
        };
        let task = task::SwarmTask::new(identity, &config, task::GivenAddresses { plain, named }, inbox, reports)?;
        let listening = task.listen(&config.listen).await?;
        tokio::spawn(listening.run());
        let lanes = Arc::new(Mutex::new(lanes));
        Ok(Self { peer_id: identity.peer_id(), commands, addresses, connected, published, reach, lanes })
    }

    /// This member's own peer id.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.peer_id
    }

    /// The addresses this member listens on, each ending in `/p2p/<peer id>`, so that each can be given to others
    /// as a bootstrap address. Empty for a client.
    #[must_use]
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.addresses.borrow().clone()
    }

    /// As [`addresses`](Self::addresses), to be told when they change.
    #[must_use]
    pub fn watch_addresses(&self) -> watch::Receiver<Vec<Multiaddr>> {
        self.addresses.clone()
    }

    /// How many members of the network, other than clients, are connected on the control plane at present.
    #[must_use]
    pub fn connected_members(&self) -> usize {
        *self.connected.borrow()
    }

    /// Waits until at least one member is connected and known to the DHT, so that look-ups have somebody to ask.
    ///
    /// # Errors
    /// [`LookupError::NoBootstrap`] when none is connected after `timeout`.
    pub async fn wait_connected(&self, timeout: Duration) -> Result<(), LookupError> {
        let mut connected = self.connected.clone();
        let joined = async { connected.wait_for(|members| *members > 0).await.map(drop) };
        match tokio::time::timeout(timeout, joined).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(LookupError::Stopped),
            Err(_) => {
                let (answer, failures) = oneshot::channel();
                self.send(Command::BootstrapFailures { answer }).await?;
                let failures = failures.await.map_err(|_| LookupError::Stopped)?;
                Err(LookupError::NoBootstrap { waited: timeout, failures })
            }
        }
    }

    /// Sets what this member hosts: the adverts it answers with, each to questions about some models, and the provider records it publishes, in place of
    /// all earlier ones. Records are published again by themselves when new peers appear and every two minutes.
    /// An empty list withdraws: the member then answers that it hosts nothing.
    ///
    /// # Errors
    /// [`LookupError::Stopped`].
    pub async fn announce(
        &self,
        adverts: Vec<(Vec<ModelId>, SignedAdvert)>,
        keys: Vec<ProviderKey>,
    ) -> Result<(), LookupError> {
        let adverts = adverts.into_iter().map(|(models, advert)| (models, advert.encode())).collect();
        self.send(Command::Announce { adverts, keys }).await
    }

    /// Waits until the provider records of the last [`Self::announce`] are with other members, at most for `timeout`; `false` if they
    /// are not, as for the first member of a network.
    pub async fn wait_published(&self, timeout: Duration) -> bool {
        let mut published = self.published.clone();
        matches!(tokio::time::timeout(timeout, published.wait_for(|published| *published)).await, Ok(Ok(_)))
    }

    /// Looks up who provides `key`; the channel yields each provider once, as soon as it is known, and closes when
    /// the DHT has no more to say. Dropping the receiver ends the look-up early.
    ///
    /// # Errors
    /// [`LookupError::Stopped`].
    pub async fn providers(&self, key: ProviderKey) -> Result<mpsc::Receiver<PeerId>, LookupError> {
        let (found, receiver) = mpsc::channel(PROVIDER_QUEUE);
        self.send(Command::Providers { key, found }).await?;
        Ok(receiver)
    }

    /// Asks `peer` for its advert of `model` or a variant of it, or of every model it hosts. Adverts that are not the peer's own or break a rule are
    /// left out. One whose times are wrong counts all the same, since it comes from its author just now; that a clock is wrong is
    /// logged.
    ///
    /// # Errors
    /// [`LookupError::Unreachable`] when the peer cannot be dialled or does not answer in time.
    pub async fn adverts(&self, peer: PeerId, model: Option<ModelId>) -> Result<Vec<Advert>, LookupError> {
        let adverts = self.adverts_with_times(peer, model).await?;
        let believed = |(advert, wrong_times): (Advert, Option<AdvertError>)| {
            if let Some(reason) = wrong_times {
                tracing::warn!(%peer, %reason, "this peer's clock or ours is wrong");
            }
            advert
        };
        Ok(adverts.into_iter().map(believed).collect())
    }

    /// As [`Self::adverts`], with what is wrong with the times of each, see [`SignedAdvert::verify_from`].
    ///
    /// # Errors
    /// As [`Self::adverts`].
    pub async fn adverts_with_times(
        &self,
        peer: PeerId,
        model: Option<ModelId>,
    ) -> Result<Vec<(Advert, Option<AdvertError>)>, LookupError> {
        let (answer, receiver) = oneshot::channel();
        self.send(Command::Adverts { peer, model, answer }).await?;
        let encoded = receiver.await.map_err(|_| LookupError::Stopped)??;
        let now = unix_ms();
        let read = |bytes: &Vec<u8>| SignedAdvert::decode(bytes).and_then(|signed| signed.verify_from(peer, now));
        let mut adverts = Vec::new();
        for bytes in &encoded {
            match read(bytes) {
                Ok(advert) if model.is_none_or(|model| advert.0.serves(model)) => adverts.push(advert),
                Ok((advert, _)) => tracing::debug!(%peer, model = %advert.model, "an advert that was not asked for"),
                Err(reason) => tracing::debug!(%peer, %reason, "advert not believed"),
            }
        }
        Ok(adverts)
    }

    /// How others reach this member; changes as AutoNAT, the router and relays have their say.
    #[must_use]
    pub fn reach(&self) -> watch::Receiver<Reach> {
        self.reach.clone()
    }

    /// The best way to `peer` for frames over the control plane: a connection that stands, direct before relayed, or else a new one
    /// to `addresses`, circuits among them, and to those that are known. The connection is shared with the control plane.
    ///
    /// A dropped future leaves nothing behind but perhaps the connection.
    ///
    /// # Errors
    /// [`LookupError::Unreachable`] when the peer cannot be dialled within `timeout`.
    pub async fn connect_data(
        &self,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        timeout: Duration,
    ) -> Result<DataConnection, LookupError> {
        let (answer, receiver) = oneshot::channel();
        self.send(Command::Lane { peer, addresses, answer }).await?;
        let late = |_| LookupError::Unreachable { peer, reason: format!("no connection within {timeout:?}") };
        let lane = tokio::time::timeout(timeout, receiver).await.map_err(late)?;
        Ok(DataConnection::over_lane(lane.map_err(|_| LookupError::Stopped)??))
    }

    /// Tries once more to punch a hole to `peer`, by a new connection through one of `circuits`; returns at once. Where it succeeds,
    /// [`connect_data`](Self::connect_data) gives the direct connection from then on.
    ///
    /// # Errors
    /// [`LookupError::Stopped`].
    pub async fn punch(&self, peer: PeerId, circuits: Vec<Multiaddr>) -> Result<(), LookupError> {
        self.send(Command::Punch { peer, circuits }).await
    }

    /// Asks the router to lead to the data plane's UDP `socket` too, if it is asked for ports at all ([`ReachConfig::upnp`]); returns at
    /// once. [`Reach::data`] tells whether it does.
    ///
    /// # Errors
    /// [`LookupError::Stopped`].
    pub async fn forward_data(&self, socket: SocketAddr) -> Result<(), LookupError> {
        self.send(Command::ForwardData { socket }).await
    }

    /// The next connection of the control plane on which a peer sends frames; `None` once the control plane has stopped. A
    /// dropped future loses nothing.
    pub async fn accept_data(&self) -> Option<DataConnection> {
        self.lanes.lock().await.recv().await.map(DataConnection::over_lane)
    }

    /// Ends the swarm task and closes its connections; returns when it has ended.
    pub async fn shutdown(&self) {
        let (done, ended) = oneshot::channel();
        if self.send(Command::Shutdown { done }).await.is_ok() {
            // An error means that the task has ended already, which is what was wanted.
            let _ = ended.await;
        }
    }

    async fn send(&self, command: Command) -> Result<(), LookupError> {
        self.commands.send(command).await.map_err(|_| LookupError::Stopped)
    }
}
