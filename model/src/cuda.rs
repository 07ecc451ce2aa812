//! Experts, and a trunk's matrices, on NVIDIA cards.
//!
//! The kernels (`cuda/kernels.cu`) are compiled ahead to PTX (`cuda/kernels.ptx`), which the driver translates for whatever card is
//! there; nothing but the driver is needed, and that is opened at run time. They add up in the order of the CPU's kernels, so that a
//! row has the same bits wherever it is computed.
//!
//! What is pure is apart from what talks to the driver: `panels` and `columns` lay experts out and `plan` divides a pass into launches;
//! `plain` does both for matrices by themselves.

mod columns;
mod dtype;
mod panels;
mod plain;
mod plan;

#[cfg(feature = "cuda")]
mod card;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod products;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub(crate) use card::{cards, open, uuids};

/// The kernels, as the driver reads them.
const PTX: &str = include_str!("cuda/kernels.ptx");
