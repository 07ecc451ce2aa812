//! What peers say to each other: identity, adverts, frames, discovery and the data plane.
//!
//! Two planes share one Ed25519 identity. The *control plane* (`discovery`) is a libp2p swarm on which members announce what
//! they host and hand out signed [`Advert`]s. The *data plane* ([`DataEndpoint`]) is QUIC with ALPN `hanse/1`: a client sends an
//! [`ExpertCall`] on a stream and gets an [`ExpertAnswer`] or a [`Refusal`] back. Both planes prove the peer id in TLS 1.3, so a
//! connection *is* an authenticated [`PeerId`].
//!
//! The bytes are specified in `docs/protocol.md`. Everything read from a stranger is parsed once, against stated limits, into
//! types that cannot be wrong.
//!
//! ```no_run
//! use hanse_protocol::{DataEndpoint, Frame, Hello, Identity, ModelId};
//! use std::time::Duration;
//!
//! # async fn example(peer: hanse_protocol::PeerId) -> Result<(), Box<dyn std::error::Error>> {
//! let endpoint = DataEndpoint::bind(&Identity::generate(), "0.0.0.0:0".parse()?)?;
//! let connection = endpoint.connect(peer, "192.0.2.7:4700".parse()?, Duration::from_secs(5)).await?;
//! let hello = Frame::Hello(Hello { network: "hanse".into(), model: ModelId([0; 32]) });
//! match connection.call(&hello, Duration::from_secs(5)).await? {
//!     Frame::Welcome(welcome) => println!("{} takes up to {} rows", connection.peer_id(), welcome.max_rows),
//!     Frame::Refusal(refusal) => println!("refused: {}", refusal.message),
//!     _ => unreachable!("`call` refuses every other answer"),
//! }
//! # Ok(())
//! # }
//! ```

mod advert;
pub mod discovery;
mod dtype;
mod frame;
mod identity;
mod manifest;
mod model_id;
mod precision;
mod relayed;
mod transport;
mod tree;

pub use advert::{
    ASSUMED_LIFETIME, Advert, AdvertError, Draining, HostedError, HostedExperts, MAX_ADVERT_BYTES, MAX_ADVERT_LIFETIME,
    MAX_CIRCUIT_BYTES, MAX_CIRCUITS, MAX_DATA_ADDRESSES, MAX_EXPERTS, MAX_LAYERS, MAX_POPULARITY, SignedAdvert,
    popularity, rows_per_minute,
};
pub use dtype::{Combine, DecodeError, EncodeError, UnknownDtype, WireDtype};
pub use frame::{
    Chunk, ExpertAnswer, ExpertCall, ExpertRows, Fetch, Frame, FrameError, FrameKind, FrameLimits, Hello,
    MAX_CHUNK_BYTES, Malformed, PREFIX_BYTES, Refusal, RefusalCode, VERSION, Wanted, Welcome, read_frame, write_frame,
};
pub use identity::{Identity, IdentityError, verify_signature};
pub use libp2p::{Multiaddr, PeerId, multiaddr};
pub use manifest::{
    Blob, ExpertLayer, ExpertRun, Locations, MANIFEST_FILE, MAX_BLOB_BYTES, MAX_CONFIG_BYTES, MAX_FILES,
    MAX_MANIFEST_BYTES, MAX_TRUNK_TENSORS, Manifest, ManifestError, ManifestFile, Place, SignedManifest, TensorDtype,
    TrunkTensor,
};
pub use model_id::{ModelId, ParseModelIdError};
pub use precision::Precision;
pub use transport::{
    ALPN, BindError, CallError, ConnectError, DataConnection, DataEndpoint, EstablishError, FrameStream, Path,
    PendingConnection, data_runtime,
};
pub use tree::{BlobHash, CHAINING_VALUE_BYTES, GROUP_BYTES, GroupTree, ParseHashError, TreeBuilder, group_count};
