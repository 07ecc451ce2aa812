//! One file per command; each takes its parsed arguments and says what went wrong as an error.

pub(crate) mod bench;
pub(crate) mod carve;
pub(crate) mod chat;
mod client;
pub(crate) mod completions;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod gateway;
pub(crate) mod generate;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod manifest;
pub(crate) mod node;
pub(crate) mod pause;
pub(crate) mod quantize;
pub(crate) mod score;
pub(crate) mod status;
#[cfg(unix)]
pub(crate) mod testnet;
