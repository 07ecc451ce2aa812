//! `hanse bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use hanse_model::DeviceChoice;
use hanse_protocol::WireDtype;

use super::examples;

#[derive(Debug, Args)]
#[command(after_help = examples::BENCH)]
pub(crate) struct BenchArgs {
    /// What to measure, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "call,generate,memory", value_name = "PART")]
    pub(crate) part: Vec<BenchPart>,
    /// A model folder; by default the small model that comes with the source.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// In the part trunk, what is measured beside the processor: one NVIDIA card such as cuda:0, `metal`, or `auto` for one if there is any.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", value_parser = super::trunk_device)]
    pub(crate) device: DeviceChoice,
    /// How many loopback volunteers to start; the experts are split evenly among them.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) nodes: u16,
    /// Tokens generated in each round.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// Rounds; each generates once locally and once over the network.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) rounds: usize,
    /// Single-row expert calls to time, in the parts call and floor.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub(crate) calls: usize,
    /// Encoding of hidden states on the wire.
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub(crate) wire: WireDtype,
    /// Round trip to be added to the path to every volunteer's data plane, such as 20ms.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with_all = ["drafts", "curves"])]
    pub(crate) rtt: Duration,
    /// Measure drafts instead: the same generations without and with them, over paths with these round trips.
    #[arg(long, value_name = "RTT", value_delimiter = ',', num_args = 0.., default_missing_values = ["20ms", "80ms"], value_parser = humantime::parse_duration)]
    pub(crate) drafts: Option<Vec<Duration>>,
    /// Measure how cost grows instead, in f32, and write a picture of each curve into this folder.
    #[arg(long, value_name = "DIR", conflicts_with = "drafts")]
    pub(crate) curves: Option<PathBuf>,
    /// Which curves, separated by commas; all by default.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = CurveName::ALL, hide_default_value = true, requires = "curves", value_name = "CURVE")]
    pub(crate) curve: Vec<CurveName>,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A part of `hanse bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPart {
    /// What this machine does at best: memory, arithmetic, a datagram and back.
    Limits,
    /// How fast rows are written and read in each wire dtype.
    Wire,
    /// How fast the model's experts are computed, as shares of what the machine does at best.
    Experts,
    /// How fast everything but the experts is computed.
    Trunk,
    /// One expert call.
    Call,
    /// One expert call beside an echo of the same bytes over bare QUIC.
    Floor,
    /// Many clients of one volunteer, and how fast a full one refuses.
    Crowd,
    /// Generations over the network beside generations in one process.
    Generate,
    /// Many generations at a time through one client, over the network beside in one process.
    Batch,
    /// Memory of a client and of volunteers.
    Memory,
}

/// What the cost is shown against by `hanse bench --curves`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CurveName {
    /// Tokens per second and the round trip.
    RoundTrip,
    /// Tokens per second and packets that are lost.
    Loss,
    /// Tokens per second and the number of volunteers.
    Peers,
    /// Tokens per second and the replicas of each expert.
    Replicas,
    /// Tokens per second of sequences that advance together.
    Batch,
    /// Tokens per second and the length of the context.
    Context,
    /// Time until the first token and the length of the prompt.
    Prefill,
    /// Bytes per token, by wire dtype and number of volunteers.
    Bytes,
    /// Memory of a client and of volunteers.
    Memory,
}

impl CurveName {
    pub(crate) const ALL: [Self; 9] = [
        Self::RoundTrip,
        Self::Loss,
        Self::Peers,
        Self::Replicas,
        Self::Batch,
        Self::Context,
        Self::Prefill,
        Self::Bytes,
        Self::Memory,
    ];
}

impl BenchPart {
    /// Whether volunteers have to be started for it.
    pub(crate) fn needs_network(self) -> bool {
        !matches!(self, Self::Limits | Self::Wire | Self::Experts | Self::Trunk)
    }
}
