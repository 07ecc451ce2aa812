//! One simulated volunteer.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hanse_protocol::discovery::{Reachability, unix_ms};
use hanse_protocol::{Advert, HostedExperts, ModelId, Precision, WireDtype};
use rand::Rng;
use rand::rngs::StdRng;

use super::Scenario;
use crate::placement::{Turns, View};

/// The model that everybody hosts.
pub(super) const MODEL: ModelId = ModelId([7; 32]);

/// What an advert says that matters here.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) hosted: HostedExperts,
    pub(super) popularity: Vec<u8>,
    pub(super) loading: HostedExperts,
}

impl Said {
    pub(super) fn add_to(&self, view: &mut View) {
        view.add(&self.hosted, &self.popularity, &self.loading);
    }

    pub(super) fn remove_from(&self, view: &mut View) {
        view.remove(&self.hosted, &self.popularity, &self.loading);
    }
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) memory: u64,
    /// Bytes a second from the network.
    pub(super) line: f64,
    pub(super) availability: f64,
    pub(super) seed: u64,
    pub(super) online: bool,
    /// Counts sessions: events of earlier ones mean nothing.
    pub(super) session: u64,
    pub(super) hosted: BTreeSet<(u32, u32)>,
    pub(super) loading: BTreeSet<(u32, u32)>,
    pub(super) retiring: BTreeSet<(u32, u32)>,
    /// What was fetched in earlier sessions and is on its disk.
    pub(super) cache: BTreeSet<(u32, u32)>,
    pub(super) turns: Turns,
    /// Its advert as it is now, and as others saw it last.
    pub(super) said: Option<Arc<Said>>,
    pub(super) seen: Option<Arc<Said>>,
}

impl Member {
    pub(super) fn new(scenario: &Scenario, random: &mut StdRng) -> Self {
        let memory = memory(scenario, random) as u64;
        let seed = random.random();
        Self {
            memory,
            // 20 Mbit/s to 1 Gbit/s, each order of magnitude as frequent.
            line: 2.5e6 * 50f64.powf(random.random()),
            availability: random.random_range(scenario.availability.0..scenario.availability.1),
            seed,
            online: false,
            session: 0,
            hosted: BTreeSet::new(),
            loading: BTreeSet::new(),
            retiring: BTreeSet::new(),
            cache: BTreeSet::new(),
            turns: Turns::new(scenario.pace, seed),
            said: None,
            seen: None,
        }
    }

    /// How long it takes to load some experts, and the bytes that come over the network for it.
    pub(super) fn load_time(&self, experts: &[(u32, u32)], expert_bytes: u64) -> (Duration, u64) {
        /// Bytes a second from a disk.
        const DISK: f64 = 500e6;
        let cached = experts.iter().filter(|pair| self.cache.contains(pair)).count() as u64;
        let fetched = (experts.len() as u64 - cached) * expert_bytes;
        let seconds = fetched as f64 / self.line + (cached * expert_bytes) as f64 / DISK;
        (Duration::from_secs_f64(seconds), fetched)
    }
}

/// Bytes of a member's memory, drawn from the scenario's distribution.
pub(super) fn memory(scenario: &Scenario, random: &mut StdRng) -> f64 {
    let pareto = random.random_range(f64::EPSILON..1.0).powf(-1.0 / 1.2);
    (scenario.least_memory as f64 * pareto).min(scenario.most_memory as f64)
}

/// What a member with an IPv4 and an IPv6 address says in full.
pub(super) fn advert(said: &Said, scenario: &Scenario) -> Advert {
    let now = unix_ms();
    Advert {
        model: MODEL,
        hosted: said.hosted.clone(),
        layers: (0..scenario.layers).map(|layer| (layer, scenario.experts)).collect(),
        wire_dtypes: WireDtype::ALL.to_vec(),
        data_addresses: vec![
            SocketAddr::from((Ipv4Addr::new(203, 0, 113, 7), 4701)),
            SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7), 4701)),
        ],
        capacity_rows: 4096,
        load_permille: 100,
        draining: None,
        sequence: now,
        expires_unix_ms: now + 60 * 60 * 1000,
        popularity: said.popularity.clone(),
        loading: said.loading.clone(),
        reachability: Reachability::Direct,
        circuits: Vec::new(),
        precision: Precision::F32,
        variant_of: None,
    }
}

pub(super) fn set<'a>(experts: impl IntoIterator<Item = &'a (u32, u32)>) -> HostedExperts {
    let mut set = HostedExperts::new();
    for &(layer, expert) in experts {
        // Numbers of a scenario are in range; what is not could not be hosted either.
        let _ = set.insert(layer, expert);
    }
    set
}
