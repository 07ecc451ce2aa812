//! The client's side of Hanse: find the peers that host a model's experts, call them, and decode.
//!
//! A client holds a model's *trunk* (embeddings, attention, norms, gates, LM head, KV cache) and sends hidden states to the peers that
//! host the experts which the gate has chosen. It gets the same tokens as one process that holds everything.
//!
//! # Generate
//!
//! [`Client::connect`] joins a network through one member, finds a peer for every expert, and keeps that true in the background.
//! [`Client::generate`] is a stream of tokens.
//!
//! ```no_run
//! use futures::StreamExt;
//! use hanse_model::Checkpoint;
//! use hanse_protocol::Identity;
//! use hanse_router::{Client, GenerateRequest, ModelConfig, NetworkConfig};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = std::path::PathBuf::from("examples/models/tiny-moe");
//! // The id is a hash over the weights: peers that host anything else are never called.
//! let model = hanse_router::weights::model_id(&Checkpoint::open(&dir)?)?;
//! let bootstrap = "/ip4/192.0.2.7/udp/4001/quic-v1".parse()?;
//! let network = NetworkConfig { bootstrap: vec![bootstrap], ..NetworkConfig::default() };
//! let client = Client::connect(&ModelConfig { dir, threads: 0 }, model, &Identity::generate(), network).await?;
//!
//! let tokenizer = client.tokenizer().ok_or("the model has no tokenizer")?;
//! let prompt = tokenizer.encode("Once upon a time", true)?;
//! let mut tokens = client.generate(GenerateRequest::greedy(prompt, 64));
//! while let Some(token) = tokens.next().await {
//!     print!("{}", token?.text);
//! }
//! if let Some(summary) = tokens.summary() {
//!     println!("{}", summary.rest);
//!     println!("{:.1} tokens/s from {} peers", summary.timings.tokens_per_second(), summary.network.peers);
//! }
//! client.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! A [`Client`] is cheap to clone, and all generations of one advance together: as many as wait share one frame per peer and layer,
//! which changes none of their tokens. Dropping the stream ends a generation. [`Client::score`] gives log probabilities of a text.
//! [`Client::local`] is the same without a network, with the experts in this process: the reference for what a network must give, and
//! handy in tests.
//!
//! # Draw, stop, constrain
//!
//! ```
//! use hanse_model::SamplingParams;
//! use hanse_router::GenerateRequest;
//!
//! let request = GenerateRequest {
//!     prompt: vec![707, 625, 259, 466],
//!     max_tokens: 100,
//!     // The same seed gives the same text, on any network.
//!     sampling: SamplingParams { temperature: 0.8, top_p: Some(0.95), seed: 7, ..SamplingParams::default() },
//!     stop: vec!["\n\n".to_owned()],
//!     top_logprobs: 5,
//!     ..GenerateRequest::default()
//! };
//! # assert_eq!(request.prompt.len(), 4);
//! ```
//!
//! [`GenerateRequest::grammar`] takes whatever restricts the next token, such as a JSON schema.
//!
//! # Without a model folder
//!
//! A model's id is enough: [`weights::RemoteModel`] fetches the trunk and the tokenizer from members, checks each part against its
//! hash, and gives a checkpoint for [`Client::connect_with`].
//!
//! ```no_run
//! # use hanse_protocol::{Identity, ModelId};
//! # use hanse_router::weights::{Cache, RemoteModel};
//! # use hanse_router::{Client, NetworkConfig};
//! # async fn example(model: ModelId, network: NetworkConfig) -> Result<(), Box<dyn std::error::Error>> {
//! let cache = Cache::new("weights".as_ref(), 40 << 30)?;
//! let remote = RemoteModel::find(model, cache, &network, &[]).await?;
//! remote.fetch_trunk(&|done, total| eprintln!("{done} of {total} bytes")).await?;
//! let client = Client::connect_with(remote.checkpoint(), 0, model, &Identity::generate(), network).await?;
//! // Nothing more is fetched.
//! remote.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! # Bring your own trunk
//!
//! [`ExpertNetwork`] is the layer below: the routed experts of one layer as a function of rows and a routing, for another inference
//! engine, for a layer at a time, for research.
//!
//! ```no_run
//! # use hanse_protocol::{Identity, ModelId};
//! use hanse_model::Routing;
//! use hanse_router::{ExpertLayout, ExpertNetwork, NetworkConfig, Usage};
//!
//! # async fn example(model: ModelId, config: NetworkConfig) -> Result<(), Box<dyn std::error::Error>> {
//! // Six layers of sixteen experts over rows of 192 values.
//! let layout = ExpertLayout { hidden_size: 192, layers: (0..6).map(|layer| (layer, 16)).collect() };
//! let network = ExpertNetwork::join(&Identity::generate(), model, layout, config).await?;
//!
//! // One row, and the two experts that its gate chose, in ascending order.
//! let hidden = vec![0.5; 192];
//! let routing = Routing { top_k: 2, experts: vec![3, 11], weights: vec![0.75, 0.25] };
//! let mut usage = Usage::default();
//! let output = network.forward(0, &hidden, &routing, &mut usage).await?; // [rows, hidden_size]
//! assert_eq!(output.len(), 192);
//! for peer in network.directory().peers() {
//!     println!("{} hosts {} experts", peer.peer, peer.advert.hosted.count());
//! }
//! network.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # When things go wrong
//!
//! A call that fails or is late goes to another replica at once; nothing is computed twice in the answer, and no expert is left out.
//! If no peer hosts an expert, the request waits for [`NetworkConfig::replica_patience`], then has it computed by
//! [`NetworkConfig::fallback`] if there is one, and otherwise fails with the names of what is missing. [`JoinError`] and
//! [`GenerateError`] say whose fault it is and whether trying again makes sense.
//!
//! # Inside
//!
//! [`directory`] knows who hosts what, `membership` keeps it true with what [`search`] finds, [`plan`] chooses replicas, [`precision`] which
//! stored form of an expert counts,
//! [`dispatch`] calls them, retries and adds up, `engine` decodes all generations of a client together. With the feature `gateway` there
//! is a server that speaks OpenAI's language.

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
pub mod precision;
mod remote;
pub mod resident;
pub mod search;
pub mod stats;
#[cfg(feature = "gateway")]
pub mod view;
pub mod weights;

pub use client::{Client, ClientError, Generation, ModelConfig, Progress, Score, Summary};
pub use directory::{Directory, ExpertLayout, Missing, PeerReport, PeerState, Watching};
pub use dispatch::{CallTrace, DispatchError, LayerTrace, PassTrace, Usage};
pub use engine::{EngineConfig, EngineStatus};
pub use fallback::{Fallback, LocalFallback};
pub use generate::{Constraint, FinishReason, GenerateError, GenerateRequest, Grammar, ScoredToken, Timings, Token};
pub use network::{ExpertNetwork, JoinError, NetworkConfig};
pub use precision::PrecisionPolicy;
pub use remote::{Cancelled, RemoteExperts};
pub use resident::Resident;
pub use stats::{AnsweredCall, DraftUse, Expectation, NetworkUse, PeerStats};
