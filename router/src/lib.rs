//! The client's side of Hanse: find the peers that host a model's experts, call them, and decode.
//!
//! Two layers, both public:
//!
//! * [`Client`] holds the trunk and generates: [`Client::connect`] for a network, [`Client::local`] for experts in the
//!   same process, then [`Client::generate`], which is a stream of tokens, or [`Client::score`].
//! * [`ExpertNetwork`] below it is for people who bring their own trunk: [`ExpertNetwork::join`], then
//!   [`ExpertNetwork::forward`] for the routed experts of one layer.
//!
//! Inside: [`directory`] knows who hosts what, `membership` keeps it true with what [`search`] finds, [`plan`] chooses replicas,
//! [`dispatch`] calls them, retries and adds up, `engine` decodes all generations of a client together.

pub mod client;
pub mod directory;
pub mod dispatch;
mod engine;
pub mod fallback;
#[cfg(feature = "gateway")]
pub mod gateway;
pub mod generate;
mod membership;
pub mod network;
pub mod plan;
mod remote;
pub mod search;
pub mod stats;
#[cfg(feature = "gateway")]
pub mod view;
pub mod weights;

pub use client::{Client, ClientError, Generation, ModelConfig, Score, Summary};
pub use directory::{Directory, ExpertLayout, Missing, PeerReport, PeerState, Watching};
pub use dispatch::{CallTrace, DispatchError, LayerTrace, PassTrace, Usage};
pub use engine::{EngineConfig, EngineStatus};
pub use fallback::{Fallback, LocalFallback};
pub use generate::{Constraint, FinishReason, GenerateError, GenerateRequest, Grammar, ScoredToken, Timings, Token};
pub use network::{ExpertNetwork, JoinError, NetworkConfig};
pub use remote::{Cancelled, RemoteExperts};
pub use stats::{AnsweredCall, Expectation, NetworkUse, PeerStats};
