//! A network of many volunteers in virtual time: the placement and rebalancing of [`crate::placement`], without sockets.
//!
//! Members have unequal memories, lines and availabilities; they join, load what they chose as fast as their line allows, look at
//! adverts that are up to half a minute old, move capacity, leave or crash. Everything follows from the seed.
//!
//! How such a network is found is the subject of [`swarms`]: real control planes in real time, fewer of them.

mod member;
mod report;
pub mod swarms;
mod world;

use std::time::Duration;

use crate::placement::Pace;

pub use report::Report;
pub use world::World;

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Members, online or not.
    pub members: usize,
    /// MoE layers of the model.
    pub layers: u32,
    /// Experts of each.
    pub experts: u32,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// The smallest memory; memories follow a Pareto distribution with shape 1.2 from there on.
    pub least_memory: u64,
    /// The largest memory.
    pub most_memory: u64,
    /// Half of all sessions are shorter than this; their lengths follow an exponential distribution.
    pub median_session: Duration,
    /// Members are online for a share of the time between these two.
    pub availability: (f64, f64),
    /// The share of sessions that end without a word.
    pub crashes: f64,
    /// How fast members rebalance.
    pub pace: Pace,
    /// Everything random follows from it.
    pub seed: u64,
}

impl Default for Scenario {
    /// A thousand members and a model of the size of DeepSeek-V3: 58 layers of 256 experts of 42 MiB each.
    fn default() -> Self {
        Self {
            members: 1000,
            layers: 58,
            experts: 256,
            expert_bytes: 3 * 7168 * 2048,
            least_memory: 2 << 30,
            most_memory: 256 << 30,
            median_session: Duration::from_secs(2 * 3600),
            availability: (0.3, 0.95),
            crashes: 0.3,
            pace: Pace::default(),
            seed: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_without_churn_comes_to_rest_and_nothing_moves_any_more() {
        let scenario = Scenario {
            members: 60,
            layers: 6,
            experts: 64,
            least_memory: 20 * (3 * 7168 * 2048),
            most_memory: 400 * (3 * 7168 * 2048),
            ..Scenario::default()
        };
        for seed in 0..3 {
            let mut world = World::new(Scenario { seed, ..scenario.clone() });
            world.run(Duration::from_secs(3 * 3600));
            world.end_churn();
            world.run(Duration::from_secs(2 * 3600));
            let before = world.report();
            world.run(Duration::from_secs(3600));
            let after = world.report();
            assert!(before.moves > 0, "churn makes some move");
            assert_eq!(after.moves, before.moves, "an hour of peace");
            assert!(after.replicas_now.0 >= 2, "{:?}", after.replicas_now);
        }
    }
}
