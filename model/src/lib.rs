//! What is computed: checkpoints, families, attention, gates, expert kernels, tokenizer, sampling.
//!
//! No sockets, no async. [`Checkpoint`] opens a folder as model hubs have it and checks it; [`Trunk`] holds everything
//! but the routed experts, which it calls through [`Experts`], so that they can be in this process ([`LocalExperts`]) or
//! anywhere else.
//!
//! **A row's bits depend on nothing but the row and the weights**: not on the batch, the order, the number of threads,
//! how a prompt is cut, or whether the machine has AVX-512, AVX2 or neither. So tokens do not change with who
//! computes an expert.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use hanse_model::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = Path::new("examples/models/tiny-moe");
//! let checkpoint = Checkpoint::open(dir)?;
//! let pool = Arc::new(compute_pool(2)?);
//! let trunk = Trunk::load(&checkpoint, pool.clone())?;
//! let mut experts = LocalExperts::load(&checkpoint, pool)?;
//! let tokenizer = Tokenizer::load(dir)?;
//! let (mut text, mut sampler) = (tokenizer.stream(true), Sampler::new(SamplingParams::greedy())?);
//!
//! let mut cache = trunk.new_cache();
//! let mut tokens = tokenizer.encode("Once upon a time", true)?;
//! for _ in 0..20 {
//!     let segment = Segment { tokens: &tokens, cache: &mut cache, logits: LogitsWanted::Last };
//!     let logits = trunk.forward(&mut [segment], &mut experts)?;
//!     tokens = vec![sampler.sample(&logits[0])];
//!     print!("{}", text.push(tokens[0])?);
//! }
//! # Ok(())
//! # }
//! ```

#[cfg(target_endian = "big")]
compile_error!("weights are used in place and are little-endian");

mod activation;
mod attention;
mod cache;
#[cfg(any(cards, test))]
mod cards;
mod carve;
mod chat_template;
mod checkpoint;
mod device;
mod expert;
mod experts;
mod families;
mod folder;
mod gate;
mod generation;
mod gguf;
mod lanes;
mod linear;
pub mod peak;
mod quantise;
mod rope;
mod sampling;
mod share;
mod spec;
mod stop;
mod tokenizer;
mod trunk;

pub use cache::KvCache;
pub use carve::{CarveError, carve};
pub use chat_template::{ChatMessage, ChatTemplate, ChatTemplateError};
pub use checkpoint::{
    Checkpoint, CheckpointError, ConfigError, ExpertParts, LoadError, Mapping, Part, PartHashes, PartSource, Parts,
    Piece, Run, Sizes, StoredDtype, TrunkPart, WeightMap, tensor_shapes, weight_map_of_headers,
};
pub use device::{
    CardReport, CardUse, Cpu, Device, DeviceChoice, DeviceChoiceError, DeviceError, HeldExpert, HeldJob, OpenError,
    TrunkCard, Weights, card_uuids, cards, run_held,
};
pub use expert::{ComputeError, Expert, ExpertJob, compute_pool, run_experts};
pub use experts::{Experts, ExpertsError, LocalExperts, add_weighted};
pub use families::known as known_families;
pub use folder::WriteError;
pub use gate::Routing;
pub use generation::{GenerationDefaults, GenerationDefaultsError};
pub use gguf::{GgufError, Imported, import_gguf};
pub use lanes::{IsaError, check_isa};
pub use quantise::{FolderError, Precision, QuantiseError, Written, quantise, quantise_folder};
pub use sampling::{Sampler, SamplingError, SamplingParams, log_softmax_at, top_log_softmax};
pub use spec::{
    Activation, AttentionSpec, FeedForwardSpec, GateSpec, GroupSpec, GroupedQuerySpec, IndexerSpec, LatentSpec,
    LayerSpec, ModelSpec, MoeSpec, QkNorm, RopePairs, RopeScaling, RopeSpec, Scoring, SharedExpertSpec,
};
pub use stop::{StopOutput, StopStrings, overlap};
pub use tokenizer::{TextStream, Tokenizer, TokenizerError, VocabularyToken};
pub use trunk::{DraftHead, ForwardError, HeadOutput, LogitsWanted, Placement, Segment, Trunk};
