//! What is computed: checkpoints, families, attention, gates, expert kernels, tokenizer, sampling.
//!
//! No sockets, no async. The trunk calls the routed experts through [`Experts`], so that they can be in this process
//! ([`LocalExperts`]) or anywhere else.

#[cfg(target_endian = "big")]
compile_error!("weights are used in place and are little-endian");

mod attention;
mod cache;
mod checkpoint;
mod expert;
mod experts;
mod families;
mod gate;
mod lanes;
mod linear;
mod rope;
mod spec;
mod trunk;

pub use cache::KvCache;
pub use checkpoint::{Checkpoint, CheckpointError, ConfigError, LoadError, Sizes};
pub use expert::{Expert, ExpertJob, compute_pool, run_experts};
pub use experts::{Experts, ExpertsError, LocalExperts, add_weighted};
pub use families::known as known_families;
pub use gate::Routing;
pub use spec::{
    AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling,
    RopeSpec, SharedExpertSpec,
};
pub use trunk::{ForwardError, LogitsWanted, Segment, Trunk};
