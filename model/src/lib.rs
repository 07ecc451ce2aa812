//! What is computed: checkpoints, families, attention, gates, expert kernels, tokenizer, sampling.
//!
//! No sockets, no async. The trunk calls the routed experts through [`Experts`], so that they can be in this process
//! ([`LocalExperts`]) or anywhere else.

#[cfg(target_endian = "big")]
compile_error!("weights are used in place and are little-endian");

mod attention;
mod cache;
mod chat_template;
mod checkpoint;
mod expert;
mod experts;
mod families;
mod gate;
mod generation;
mod lanes;
mod linear;
mod rope;
mod sampling;
mod spec;
mod stop;
mod tokenizer;
mod trunk;

pub use cache::KvCache;
pub use chat_template::{ChatMessage, ChatTemplate, ChatTemplateError};
pub use checkpoint::{Checkpoint, CheckpointError, ConfigError, LoadError, Sizes, tensor_shapes};
pub use expert::{Expert, ExpertJob, compute_pool, run_experts};
pub use experts::{Experts, ExpertsError, LocalExperts, add_weighted};
pub use families::known as known_families;
pub use gate::Routing;
pub use generation::{GenerationDefaults, GenerationDefaultsError};
pub use sampling::{Sampler, SamplingError, SamplingParams, log_softmax_at};
pub use spec::{
    AttentionSpec, FeedForwardSpec, GateSpec, GroupedQuerySpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling,
    RopeSpec, SharedExpertSpec,
};
pub use stop::{StopOutput, StopStrings};
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
pub use trunk::{ForwardError, LogitsWanted, Segment, Trunk};
