//! Experts, and a trunk's matrices, on cards: NVIDIA's by CUDA's driver, or an Apple GPU by Metal.
//!
//! Which of them is said when this is built (`build.rs`). The drivers, `cuda` and `metal`, have the same objects under the same names, and
//! kernels of the same work in their languages, which add up in the order of the CPU's: a row has the same bits wherever it is computed.
//! Everything else knows only a `driver`.
//!
//! What is pure is apart from what talks to it: `panels` and `columns` lay experts out and `plan` divides a pass into launches;
//! `plain` does both for matrices by themselves.

mod columns;
mod dtype;
mod panels;
mod plain;
mod plan;

#[cfg(cards)]
mod card;
#[cfg(cards = "cuda")]
mod cuda;
#[cfg(cards = "metal")]
mod metal;
#[cfg(cards)]
mod products;
#[cfg(test)]
mod tests;

#[cfg(cards = "cuda")]
use cuda as driver;
#[cfg(cards = "metal")]
use metal as driver;

#[cfg(cards)]
pub(crate) use card::{cards, open, uuids};

/// CUDA's kernels (`cuda/kernels.cu`), compiled ahead to what the driver translates for whatever card is there.
#[cfg(any(cards = "cuda", test))]
const PTX: &str = include_str!("cards/cuda/kernels.ptx");
/// Metal's kernels, which the system compiles.
#[cfg(any(cards = "metal", test))]
const METAL: &str = include_str!("cards/metal/kernels.metal");
