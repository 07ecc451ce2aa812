//! The one task that owns the libp2p swarm.

mod adverts;
mod events;
mod joining;
mod lanes;
mod moving;
mod reachability;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::kad::{QueryId, RecordKey};
use libp2p::request_response::OutboundRequestId;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::address::is_unspecified;
use super::behaviour::{Behaviour, build_swarm, identify_version, kad_protocol};
use super::bootstrap::Bootstrap;
use super::exchange::MAX_ADVERTS;
use super::gateway::{Forwarded, Gateway, Port};
use super::keys::ProviderKey;
use super::pace::PublishPace;
use super::reach::{ReachState, Standing};
use super::retest::RetestTimes;
use super::{Command, DiscoveryConfig, DiscoveryError, LookupError, Reports};
use crate::relayed::{CircuitLimit, Lane};
use crate::{Identity, ModelId};
use adverts::AdvertQuestion;

/// How long an address may take to be listened on.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// "All interfaces" is one listener with several addresses: they are all known when none came for this long.
const INTERFACES_PAUSE: Duration = Duration::from_millis(100);
/// How often a member without any connection dials its bootstrap addresses again.
const BOOTSTRAP_RETRY: Duration = Duration::from_secs(2);
/// How often a volunteer dials those bootstrap members that it has lost: one that was started again knows nobody, and
/// newcomers find the network through it.
const BOOTSTRAP_RETURN: Duration = Duration::from_secs(5);
/// The most addresses believed of one peer.
const MAX_ADDRESSES: usize = 16;
/// Providers whose addresses are remembered.
const MAX_HINTS: usize = 4096;
/// How often relays are looked for while they are needed, and circuits that are to be renewed.
const RELAY_INTERVAL: Duration = Duration::from_secs(1);

/// A look-up of providers in progress.
struct ProviderSearch {
    found: mpsc::Sender<PeerId>,
    seen: HashSet<PeerId>,
}

pub(crate) struct SwarmTask {
    swarm: Swarm<Behaviour>,
    kad_protocol: StreamProtocol,
    identify_version: String,
    inbox: mpsc::Receiver<Command>,
    reports: Reports,
    /// Connected peers that serve the DHT of this network, and are in the routing table.
    members: HashSet<PeerId>,
    bootstrap: Bootstrap,
    /// Bootstrap addresses with host names, as given.
    names: Vec<Multiaddr>,
    resolving: JoinSet<Vec<Multiaddr>>,
    resolve_at: Instant,
    /// When the change of an own address is attended to.
    move_at: Option<Instant>,
    /// Members that are dialled anew after such a change.
    redialled: HashSet<PeerId>,
    serves: bool,
    hosted: Vec<(Vec<ModelId>, Vec<u8>)>,
    keys: Vec<ProviderKey>,
    publish_pace: PublishPace,
    /// Records on their way to other members.
    publishing: HashSet<QueryId>,
    searches: HashMap<QueryId, ProviderSearch>,
    questions: HashMap<OutboundRequestId, AdvertQuestion>,
    address_searches: HashMap<QueryId, AdvertQuestion>,
    /// Peers that are silent, and to which another connection is made.
    doubted: HashSet<PeerId>,
    reach: ReachState,
    punches: bool,
    retests: RetestTimes,
    /// The router that is asked for ports, if one is.
    gateway: Option<Gateway>,
    forwarded: Forwarded,
    /// The data plane's.
    data_port: Option<Port>,
    /// Addresses at which peers were dialled with success, without circuits.
    dialled: HashMap<PeerId, Multiaddr>,
    /// Addresses of providers, as those say who store their records: of peers behind routers nobody else knows any.
    hints: HashMap<PeerId, Vec<Multiaddr>>,
    /// What relays allow of a circuit.
    circuit_limits: HashMap<PeerId, CircuitLimit>,
    /// When a circuit to each peer was last renewed.
    renewals: HashMap<PeerId, Instant>,
    /// Who waits for a connection.
    lane_questions: HashMap<PeerId, Vec<LaneAnswer>>,
}

type LaneAnswer = oneshot::Sender<Result<Lane, LookupError>>;

/// Bootstrap addresses as they were given.
pub(crate) struct GivenAddresses {
    /// With IP addresses.
    pub(crate) plain: Vec<Multiaddr>,
    /// With host names.
    pub(crate) named: Vec<Multiaddr>,
}

/// Waits until `time`, for ever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// What the router leads here, when that has changed.
async fn forwarded(gateway: &mut Option<Gateway>) -> Forwarded {
    match gateway {
        Some(gateway) => gateway.changed().await,
        None => std::future::pending().await,
    }
}

fn record_key(key: ProviderKey) -> RecordKey {
    RecordKey::new(key.as_bytes())
}

/// The innermost error that says something: the outer layers of a transport have no text of their own.
fn root_cause(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).filter(|text| !text.is_empty()).last().unwrap_or_else(|| format!("{error:?}"))
}

impl SwarmTask {
    pub(crate) fn new(
        identity: &Identity,
        config: &DiscoveryConfig,
        given: GivenAddresses,
        inbox: mpsc::Receiver<Command>,
        reports: Reports,
    ) -> Result<Self, DiscoveryError> {
        Ok(Self {
            swarm: build_swarm(identity, config)?,
            kad_protocol: kad_protocol(&config.network)?,
            identify_version: identify_version(&config.network),
            inbox,
            reports,
            members: HashSet::new(),
            bootstrap: Bootstrap::new(identity.peer_id(), &given.plain, &config.bootstrap),
            names: given.named,
            resolving: JoinSet::new(),
            resolve_at: Instant::now(),
            move_at: None,
            redialled: HashSet::new(),
            serves: Standing::of(config) != Standing::Client,
            hosted: Vec::new(),
            keys: Vec::new(),
            publish_pace: PublishPace::new(Instant::now()),
            publishing: HashSet::new(),
            searches: HashMap::new(),
            questions: HashMap::new(),
            address_searches: HashMap::new(),
            doubted: HashSet::new(),
            reach: ReachState::new(config),
            punches: config.reach.punch,
            retests: RetestTimes::new(Instant::now()),
            gateway: (config.reach.upnp && Standing::of(config) == Standing::Unconfirmed).then(Gateway::start),
            forwarded: Forwarded::new(),
            data_port: None,
            dialled: HashMap::new(),
            hints: HashMap::new(),
            circuit_limits: HashMap::new(),
            renewals: HashMap::new(),
            lane_questions: HashMap::new(),
        })
    }

    /// Listens on every address and waits until each is bound.
    pub(crate) async fn listen(mut self, addresses: &[Multiaddr]) -> Result<Self, DiscoveryError> {
        let mut pending: HashMap<ListenerId, &Multiaddr> = HashMap::new();
        for address in addresses {
            let failed = |e: libp2p::TransportError<std::io::Error>| DiscoveryError::Listen {
                address: address.clone(),
                reason: root_cause(&e),
            };
            pending.insert(self.swarm.listen_on(address.clone()).map_err(failed)?, address);
        }
        let deadline = Instant::now() + LISTEN_TIMEOUT;
        while let Some(address) = pending.values().next().copied() {
            let failed = |reason: String| DiscoveryError::Listen { address: address.clone(), reason };
            let event = tokio::time::timeout_at(deadline, self.swarm.select_next_some())
                .await
                .map_err(|_| failed("it was not bound in time".into()))?;
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } => {
                    pending.remove(listener_id);
                }
                SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                    if let Some(address) = pending.remove(listener_id) {
                        let reason =
                            reason.as_ref().err().map_or_else(|| "the listener closed".to_owned(), ToString::to_string);
                        return Err(DiscoveryError::Listen { address: address.clone(), reason });
                    }
                }
                _ => {}
            }
            self.on_event(event);
        }
        if addresses.iter().any(is_unspecified) {
            while let Ok(event) = tokio::time::timeout(INTERFACES_PAUSE, self.swarm.select_next_some()).await
                && Instant::now() < deadline
            {
                self.on_event(event);
            }
        }
        Ok(self)
    }

    /// Runs until told to shut down or until every handle is gone.
    pub(crate) async fn run(mut self) {
        // What was listened on from the start is no change.
        self.move_at = None;
        self.resolve_at = Instant::now() + BOOTSTRAP_RETURN;
        self.dial_bootstrap();
        self.update_reach();
        let mut relays = tokio::time::interval(RELAY_INTERVAL);
        relays.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retry = tokio::time::interval(BOOTSTRAP_RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        retry.tick().await;
        let mut return_to = tokio::time::interval(BOOTSTRAP_RETURN);
        return_to.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        return_to.tick().await;
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = self.inbox.recv() => match command {
                    None => return,
                    Some(Command::Shutdown { done }) => {
                        if let Some(gateway) = self.gateway.take() {
                            gateway.end().await;
                        }
                        drop(self);
                        let _ = done.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                },
                _ = retry.tick() => {
                    if self.members.is_empty() {
                        self.dial_bootstrap();
                    }
                }
                _ = return_to.tick(), if self.serves => self.dial_bootstrap(),
                _ = relays.tick() => {
                    self.use_relays();
                    self.renew_circuits();
                    self.doubt_the_silent();
                }
                () = tokio::time::sleep_until(self.retests.next()), if self.tests() => self.test_again(),
                () = at(self.move_at) => self.move_on(),
                Some(Ok(found)) = self.resolving.join_next() => self.on_resolved(&found),
                forwarded = forwarded(&mut self.gateway) => self.on_forwarded(forwarded),
                () = tokio::time::sleep_until(self.publish_pace.at()) => self.publish(),
            }
        }
    }

    fn publish(&mut self) {
        self.publish_pace.published(Instant::now());
        self.publishing.clear();
        for key in &self.keys {
            match self.swarm.behaviour_mut().kad.start_providing(record_key(*key)) {
                // Without a member the record only lies here, and is published again when one appears.
                Ok(query) if !self.members.is_empty() => _ = self.publishing.insert(query),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "a provider record was not stored"),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Announce { adverts, keys } => {
                self.hosted = adverts;
                self.hosted.truncate(MAX_ADVERTS);
                if keys != self.keys {
                    for gone in self.keys.iter().filter(|key| !keys.contains(key)) {
                        self.swarm.behaviour_mut().kad.stop_providing(&record_key(*gone));
                    }
                    self.keys = keys;
                    self.reports.published.send_replace(false);
                    self.publish();
                }
            }
            Command::Providers { key, found } => {
                let query = self.swarm.behaviour_mut().kad.get_providers(record_key(key));
                self.searches.insert(query, ProviderSearch { found, seen: HashSet::new() });
            }
            Command::Adverts { peer, model, answer } => {
                let addresses = self.hints.get(&peer).cloned().unwrap_or_default();
                self.ask(AdvertQuestion::new(peer, model, answer), addresses);
            }
            Command::Punch { peer, circuits } => self.punch(peer, circuits),
            // Who asked may have gone meanwhile.
            Command::BootstrapFailures { answer } => _ = answer.send(self.bootstrap.failures()),
            Command::ForwardData { socket } => self.forward_data(socket),
            Command::Lane { peer, addresses, answer } => self.find_lane(peer, addresses, answer),
            // Handled where the loop can end.
            Command::Shutdown { done } => drop(done),
        }
    }
}
