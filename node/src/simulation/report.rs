//! What a simulated network is measured by.

use std::time::Duration;

use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::{ExpertRows, Identity, PeerId, SignedAdvert};
use hanse_router::plan::{Candidate, plan};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::World;
use super::member::{MODEL, advert};

/// Running sums.
#[derive(Debug)]
pub(super) struct Measures {
    pub(super) uncovered: usize,
    pub(super) in_danger: usize,
    pub(super) moves: u64,
    pub(super) moved_experts: u64,
    pub(super) called_off: u64,
    pub(super) fetched: u64,
    passed: Duration,
    covered: Duration,
    safe: Duration,
    member_hours: f64,
    slowest_plan: Duration,
    samples: Vec<(u32, u32, u32)>,
}

impl Measures {
    pub(super) fn new(experts: usize) -> Self {
        Self {
            uncovered: experts,
            in_danger: experts,
            moves: 0,
            moved_experts: 0,
            called_off: 0,
            fetched: 0,
            passed: Duration::ZERO,
            covered: Duration::ZERO,
            safe: Duration::ZERO,
            member_hours: 0.0,
            slowest_plan: Duration::ZERO,
            samples: Vec::new(),
        }
    }

    pub(super) fn pass(&mut self, time: Duration, online: usize) {
        self.passed += time;
        self.member_hours += online as f64 * time.as_secs_f64() / 3600.0;
        if self.uncovered == 0 {
            self.covered += time;
        }
        if self.in_danger == 0 {
            self.safe += time;
        }
    }

    pub(super) fn changed(&mut self, before: u32, after: u32) {
        let step = |count: &mut usize, was: bool, is: bool| match (was, is) {
            (true, false) => *count -= 1,
            (false, true) => *count += 1,
            _ => {}
        };
        step(&mut self.uncovered, before == 0, after == 0);
        step(&mut self.in_danger, before < 2, after < 2);
    }

    pub(super) fn planned(&mut self, time: Duration) {
        self.slowest_plan = self.slowest_plan.max(time);
    }

    pub(super) fn sample(&mut self, replicas: impl Iterator<Item = u32>) {
        self.samples.push(spread(replicas));
    }
}

/// Least, median and most.
fn spread(replicas: impl Iterator<Item = u32>) -> (u32, u32, u32) {
    let mut sorted: Vec<u32> = replicas.collect();
    sorted.sort_unstable();
    let at = |index: usize| sorted.get(index).copied().unwrap_or(0);
    (at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1)))
}

/// What came of it. Times are virtual, save for planning.
#[derive(Debug, Clone)]
pub struct Report {
    /// Time measured.
    pub time: Duration,
    /// Members online now.
    pub online: usize,
    /// All memories online now, as a multiple of the model.
    pub capacity: f64,
    /// The longest that one choice or one look took, real time.
    pub slowest_plan: Duration,
    /// The share of time in which every expert had a replica, and in which every expert had two.
    pub covered: f64,
    /// See `covered`.
    pub safe: f64,
    /// Least, median and most replicas of an expert now.
    pub replicas_now: (u32, u32, u32),
    /// The same, each averaged over samples every ten minutes; the first is the least of all samples.
    pub replicas: (u32, f64, f64),
    /// Moves made by rebalancing, experts moved by them, moves called off, and moves per member and hour online.
    pub moves: u64,
    /// See `moves`.
    pub moved_experts: u64,
    /// See `moves`.
    pub called_off: u64,
    /// See `moves`.
    pub moves_per_member_hour: f64,
    /// Bytes fetched per member and hour online, joining included.
    pub fetched_per_member_hour: f64,
    /// Distinct peers that a row of eight experts needs in one layer: mean, and the most seen.
    pub peers_per_layer: (f64, usize),
    /// The same for 16 rows together.
    pub peers_per_layer_batch: (f64, usize),
    /// Bytes of a signed advert, mean and most.
    pub advert_bytes: (f64, usize),
    /// Provider keys of a member, mean and most.
    pub keys: (f64, usize),
}

fn mean_and_most(values: &[usize]) -> (f64, usize) {
    let sum: usize = values.iter().sum();
    (sum as f64 / values.len().max(1) as f64, values.iter().copied().max().unwrap_or(0))
}

impl Report {
    pub(super) fn of(world: &World) -> Self {
        let measures = &world.measures;
        let share = |time: Duration| time.as_secs_f64() / measures.passed.as_secs_f64().max(1.0);
        let online = world.members.iter().filter(|member| member.online);
        let memory: u64 = online.clone().map(|member| member.memory).sum();
        let model = world.table.len() as u64 * world.scenario.expert_bytes;
        let count = measures.samples.len().max(1) as f64;
        let mean =
            |of: fn(&(u32, u32, u32)) -> u32| measures.samples.iter().map(|s| f64::from(of(s))).sum::<f64>() / count;
        // Signatures of all members have the same length.
        let identity = Identity::generate();
        let adverts: Vec<usize> = online
            .clone()
            .filter_map(|member| member.said.as_ref())
            .filter_map(|said| SignedAdvert::sign(&advert(said, &world.scenario), &identity).ok())
            .map(|signed| signed.encode().len())
            .collect();
        let keys: Vec<usize> = online
            .clone()
            .filter_map(|member| member.said.as_ref())
            .map(|said| 1 + ProviderKey::covering(MODEL, said.hosted.layers()).len())
            .collect();
        Self {
            time: measures.passed,
            online: online.count(),
            capacity: memory as f64 / model.max(1) as f64,
            slowest_plan: measures.slowest_plan,
            covered: share(measures.covered),
            safe: share(measures.safe),
            replicas_now: spread(world.alive.values().copied()),
            replicas: (measures.samples.iter().map(|s| s.0).min().unwrap_or(0), mean(|s| s.1), mean(|s| s.2)),
            moves: measures.moves,
            moved_experts: measures.moved_experts,
            called_off: measures.called_off,
            moves_per_member_hour: measures.moves as f64 / measures.member_hours.max(1.0),
            fetched_per_member_hour: measures.fetched as f64 / measures.member_hours.max(1.0),
            peers_per_layer: met(world, 1),
            peers_per_layer_batch: met(world, 16),
            advert_bytes: mean_and_most(&adverts),
            keys: mean_and_most(&keys),
        }
    }
}

/// Distinct peers that [`plan`] asks for one layer, over all layers.
fn met(world: &World, rows: u32) -> (f64, usize) {
    const TOP_K: usize = 8;
    let mut random = StdRng::seed_from_u64(world.scenario.seed);
    let ids: Vec<PeerId> = world.members.iter().map(|_| Identity::generate().peer_id()).collect();
    let mut counts = Vec::new();
    for layer in 0..world.scenario.layers {
        let mut chosen: std::collections::BTreeMap<u32, Vec<u32>> = std::collections::BTreeMap::new();
        for row in 0..rows {
            let mut of_row = std::collections::BTreeSet::new();
            while of_row.len() < TOP_K.min(world.scenario.experts as usize) {
                of_row.insert(random.random_range(0..world.scenario.experts));
            }
            of_row.into_iter().for_each(|expert| chosen.entry(expert).or_default().push(row));
        }
        let wanted: Vec<ExpertRows> = chosen
            .into_iter()
            .map(|(expert, rows)| ExpertRows { expert, weights: vec![1.0; rows.len()], rows })
            .collect();
        let candidates: Vec<Candidate> = world
            .members
            .iter()
            .zip(&ids)
            .filter(|(member, _)| member.online)
            .map(|(member, &peer)| Candidate {
                peer,
                hosts: wanted.iter().map(|want| member.hosted.contains(&(layer, want.expert))).collect(),
                overhead: Duration::from_millis(30),
                per_assignment: Duration::from_micros(200),
            })
            .filter(|candidate| candidate.hosts.contains(&true))
            .collect();
        if let Ok(shares) = plan(&wanted, &candidates, layer.into()) {
            counts.push(shares.len());
        }
    }
    mean_and_most(&counts)
}
