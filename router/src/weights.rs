//! A model's manifest and weights: made, found, fetched, kept and given out.
//!
//! A model is named by the hash of its [`Manifest`](hanse_protocol::Manifest), which lists every tensor of the trunk, every
//! expert and the tokenizer's files by content hash. So it does not matter where bytes come from: [`mod@describe`] makes the
//! manifest of a folder, [`fetch`] gets blobs from any [`source`] (peers, an HTTP endpoint), [`cache`] keeps them on disk,
//! [`remote`] is a checkpoint made of them, and [`shelf`] is what a member gives out.

pub mod cache;
pub mod describe;
pub mod fetch;
pub mod http;
pub mod peers;
pub mod remote;
pub mod shelf;
pub mod source;

pub use cache::{Cache, CacheError};
pub use describe::{DescribeError, Described, FILES, describe, model_id};
pub use fetch::{FetchError, Fetcher};
pub use http::{Hub, HubSource, Repository, RepositoryError};
pub use peers::Peers;
pub use remote::{RemoteError, RemoteModel};
pub use shelf::{Shelf, ShelfError};
pub use source::{Item, Source, SourceError, What};
