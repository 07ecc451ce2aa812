//! A network of real control planes in one process: Kademlia, records and adverts as everywhere, connected by memory instead of sockets.
//!
//! Members host what [`choose`] gives them and publish it; a client that joins then finds them as every client does, by `PeerSearch`.
//! Nothing is virtual here but the transport: times are real and depend on the machine that all members share, bytes do not.

mod client;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, DiscoveryError, LookupError, Traffic};
use hanse_protocol::{AdvertError, Identity, Multiaddr, SignedAdvert, multiaddr};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::Scenario;
use super::member::{MODEL, Said, advert, memory, set};
use crate::placement::{ExpertTable, TARGET_REPLICAS, View, choose};

pub use client::{Found, SwarmClient};

/// Members that join at the same time while the network grows.
const JOINING_AT_A_TIME: usize = 8;
/// Members that a newcomer is told of.
const BOOTSTRAP_MEMBERS: usize = 3;
/// A member that is not connected or has not published after this never will.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a network of swarms cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwarmError {
    /// There must be somebody.
    #[error("a network needs at least one member")]
    Empty,
    /// A control plane did not start.
    #[error(transparent)]
    Start(#[from] DiscoveryError),
    /// A control plane ended, or found nobody.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The model is none that an advert can describe.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// Provider records did not reach others.
    #[error("{0} members have not published their records within {PATIENCE:?}")]
    Unpublished(usize),
}

#[derive(Debug)]
struct Member {
    discovery: Discovery,
    traffic: Arc<Traffic>,
    keys: usize,
    advert_bytes: usize,
}

/// Mean and most of something that each member has.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count().max(1);
        Self { mean: values.clone().sum::<f64>() / count as f64, most: values.fold(0.0, f64::max) }
    }
}

/// What members of a grown network cost each other.
#[derive(Debug, Clone, Serialize)]
pub struct Growth {
    /// Members.
    pub members: usize,
    /// How often the whole model is hosted.
    pub copies: f64,
    /// Seconds until the last member had published its records.
    pub seconds: f64,
    /// Provider keys of a member.
    pub keys: Spread,
    /// Bytes of a signed advert.
    pub advert_bytes: Spread,
    /// Bytes that a member had sent and received by then.
    pub bytes: Spread,
    /// Connections that it had made or accepted by then.
    pub connections: Spread,
}

/// What members exchange while nobody comes or asks, per minute.
#[derive(Debug, Clone, Serialize)]
pub struct Rest {
    /// Bytes that a member sent.
    pub sent: Spread,
    /// Bytes that it received.
    pub received: Spread,
    /// Connections that it made or accepted.
    pub connections: Spread,
}

/// A network that has grown and published.
#[derive(Debug)]
pub struct Swarms {
    members: Vec<Member>,
    view: View,
    random: StdRng,
}

fn identity(random: &mut StdRng) -> Identity {
    Identity::from_secret(&random.random())
}

/// The control plane of one member, or of a client if it does not listen.
async fn start(
    identity: &Identity,
    listens: bool,
    bootstrap: Vec<Multiaddr>,
) -> Result<(Discovery, Arc<Traffic>), SwarmError> {
    let traffic = Arc::new(Traffic::default());
    let listen = listens.then(|| Multiaddr::from(multiaddr::Protocol::Memory(0)));
    let config = DiscoveryConfig {
        listen: listen.into_iter().collect(),
        bootstrap,
        in_process: Some(traffic.clone()),
        ..DiscoveryConfig::default()
    };
    Ok((Discovery::start(identity, config).await?, traffic))
}

impl Swarms {
    /// Lets `scenario.members` members join one after another, each through some that are there already, and waits until all have
    /// published. Of the scenario only the members, the model, the memories and the seed matter. Members host [`TARGET_REPLICAS`] copies
    /// of the model together, or more if their memories hold more.
    ///
    /// # Errors
    /// See [`SwarmError`].
    pub async fn grow(scenario: &Scenario) -> Result<(Self, Growth), SwarmError> {
        let mut random = StdRng::seed_from_u64(scenario.seed);
        let adverts = hosted(scenario, &mut random);
        let mut swarms = Self { members: Vec::new(), view: View::new(table(scenario)), random };
        let started = Instant::now();
        let mut adverts = adverts.into_iter();
        loop {
            // The first has nobody to join through, and the next ones only it.
            let together = swarms.members.len().clamp(1, JOINING_AT_A_TIME);
            let arrivals: Vec<_> = adverts
                .by_ref()
                .take(together)
                .map(|said| {
                    swarms.view.add(&said.hosted, &said.popularity, &said.loading);
                    (identity(&mut swarms.random), swarms.bootstrap(), said)
                })
                .collect();
            if arrivals.is_empty() {
                break;
            }
            let joined =
                arrivals.into_iter().map(|(identity, bootstrap, said)| join(scenario, identity, bootstrap, said));
            swarms.members.extend(futures::future::try_join_all(joined).await?);
        }
        swarms.wait_published().await?;
        let growth = swarms.growth(started.elapsed())?;
        Ok((swarms, growth))
    }

    fn bootstrap(&mut self) -> Vec<Multiaddr> {
        let some = self.members.choose_multiple(&mut self.random, BOOTSTRAP_MEMBERS);
        some.flat_map(|member| member.discovery.addresses()).collect()
    }

    async fn wait_published(&self) -> Result<(), SwarmError> {
        // Alone one publishes to nobody.
        let publishing = self.members.iter().filter(|_| self.members.len() > 1);
        let published = futures::future::join_all(publishing.map(|m| m.discovery.wait_published(PATIENCE))).await;
        match published.iter().filter(|published| !**published).count() {
            0 => Ok(()),
            late => Err(SwarmError::Unpublished(late)),
        }
    }

    fn growth(&self, took: Duration) -> Result<Growth, SwarmError> {
        let of = |what: fn(&Member) -> u64| Spread::of(self.members.iter().map(move |member| what(member) as f64));
        let replicas = self.view.all_replicas();
        Ok(Growth {
            members: self.members.len(),
            copies: replicas.iter().map(|r| f64::from(*r)).sum::<f64>() / replicas.len().max(1) as f64,
            seconds: took.as_secs_f64(),
            keys: of(|member| member.keys as u64),
            advert_bytes: of(|member| member.advert_bytes as u64),
            bytes: of(|member| member.traffic.sent() + member.traffic.received()),
            connections: of(|member| member.traffic.connections()),
        })
    }

    /// Lets time pass and says what members exchanged in it.
    pub async fn rest(&self, time: Duration) -> Rest {
        let count = |member: &Member| [member.traffic.sent(), member.traffic.received(), member.traffic.connections()];
        let before: Vec<[u64; 3]> = self.members.iter().map(count).collect();
        tokio::time::sleep(time).await;
        let minutes = time.as_secs_f64() / 60.0;
        let passed: Vec<[f64; 3]> = self
            .members
            .iter()
            .zip(before)
            .map(|(member, before)| {
                let now = count(member);
                std::array::from_fn(|which| (now[which] - before[which]) as f64 / minutes)
            })
            .collect();
        let [sent, received, connections] = std::array::from_fn(|which| Spread::of(passed.iter().map(|m| m[which])));
        Rest { sent, received, connections }
    }

    /// A client that knows some members' addresses and nothing else.
    ///
    /// # Errors
    /// See [`SwarmError`].
    pub async fn client(&mut self) -> Result<SwarmClient, SwarmError> {
        let bootstrap = self.bootstrap();
        let (discovery, traffic) = start(&identity(&mut self.random), false, bootstrap).await?;
        Ok(SwarmClient::new(discovery, traffic, self.view.table().clone(), self.members.len()))
    }

    /// Ends all members.
    pub async fn shutdown(self) {
        futures::future::join_all(self.members.iter().map(|member| member.discovery.shutdown())).await;
    }
}

fn table(scenario: &Scenario) -> Arc<ExpertTable> {
    let layers = (0..scenario.layers).map(|layer| (layer, (scenario.experts, scenario.expert_bytes))).collect();
    Arc::new(ExpertTable::new(&layers))
}

/// What members host that chose one after another.
fn hosted(scenario: &Scenario, random: &mut StdRng) -> Vec<Said> {
    let mut view = View::new(table(scenario));
    let model = view.table().len() as f64 * scenario.expert_bytes as f64;
    let memories: Vec<f64> = (0..scenario.members).map(|_| memory(scenario, random)).collect();
    let enough = f64::from(TARGET_REPLICAS) * model / memories.iter().sum::<f64>().max(1.0);
    let mut all = Vec::new();
    for memory in memories {
        // A little more than enough, since memories are not filled to the last byte.
        let budget = memory * enough.max(1.0) + scenario.expert_bytes as f64;
        let hosted = set(&choose(&view, &hanse_protocol::HostedExperts::new(), budget as u64, random.random()));
        let popularity = hosted.iter().map(|_| random.random_range(4..8)).collect();
        let said = Said { hosted, popularity, ..Said::default() };
        said.add_to(&mut view);
        all.push(said);
    }
    all
}

async fn join(
    scenario: &Scenario,
    identity: Identity,
    bootstrap: Vec<Multiaddr>,
    said: Said,
) -> Result<Member, SwarmError> {
    let joins = !bootstrap.is_empty();
    let (discovery, traffic) = start(&identity, true, bootstrap).await?;
    if joins {
        discovery.wait_connected(PATIENCE).await?;
    }
    let mut keys = ProviderKey::covering(MODEL, said.hosted.layers());
    keys.extend([ProviderKey::volunteers(), ProviderKey::weights(MODEL)]);
    let signed = SignedAdvert::sign(&advert(&said, scenario), &identity)?;
    let (count, advert_bytes) = (keys.len(), signed.encode().len());
    discovery.announce(vec![(vec![MODEL], signed)], keys).await?;
    Ok(Member { discovery, traffic, keys: count, advert_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_finds_every_expert_and_every_member_though_an_answer_names_twenty() {
        // All in one range of layers: each member provides the same keys.
        let scenario = Scenario { members: 22, layers: 8, experts: 64, expert_bytes: 1 << 20, ..Scenario::default() };
        let (mut swarms, growth) = Swarms::grow(&scenario).await.unwrap();
        assert_eq!((growth.members, growth.keys.most), (22, 3.0));
        assert!(growth.copies >= f64::from(TARGET_REPLICAS), "{growth:?}");
        let found = swarms.client().await.unwrap().discover(PATIENCE).await;
        assert!(found.covered.is_some() && found.all.is_some(), "{found:?}");
        assert!(found.covered <= found.all && found.bytes_covered <= found.bytes_all, "{found:?}");
        swarms.shutdown().await;
    }
}
