//! What the owner of a machine says to a node, and to one that runs.

use std::path::PathBuf;

use clap::Args;
use hanse_node::owner::QuietHours;

/// What the owner of the machine keeps for other things.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    /// Compute on N cores at most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) max_cores: Option<u16>,
    /// Hold no more than this in experts, whatever else is asked for.
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_memory: Option<bytesize::ByteSize>,
    /// Send no more than this in a second, such as 2MiB.
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bandwidth: Option<bytesize::ByteSize>,
    /// Pause between these times of the day, local time, such as 22:00-07:00.
    #[arg(long, value_name = "FROM-TO")]
    pub(crate) quiet_hours: Option<QuietHours>,
    /// Pause while other programs keep more than so many cores busy (load average over a minute, without this node's part).
    #[arg(long, value_name = "CORES")]
    pub(crate) yield_above: Option<f64>,
    /// Give a card back while another program takes it: within two seconds its calls are refused and all its memory is free. When others
    /// have been quiet it is used again. Asks NVML, which comes with the driver.
    #[arg(long)]
    pub(crate) yield_to_others: bool,
    /// Memory of a card that others may take, beyond what they had when this node opened it, before it is given to them.
    #[arg(long, default_value = "256MiB", value_name = "SIZE", requires = "yield_to_others")]
    pub(crate) yield_memory: bytesize::ByteSize,
    /// The share of a second in which others may compute on a card before it is given to them.
    #[arg(long, default_value_t = 30, value_name = "PERCENT", requires = "yield_to_others",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) yield_busy: u8,
    /// Seconds for which others must take less than three quarters of that before a card is used again.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", requires = "yield_to_others",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) yield_quiet: u64,
}

/// Which running node is meant.
#[derive(Debug, Args)]
pub(crate) struct ControlArgs {
    /// The node's data folder; by default hanse in the user's data folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}
