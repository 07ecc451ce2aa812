//! The arguments of `hanse testnet`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::examples::testnet as examples;

#[derive(Debug, Subcommand)]
pub(crate) enum TestnetCommand {
    /// Start a network and keep it until ctrl-C or `down`.
    #[command(after_help = examples::UP)]
    Up(UpArgs),
    /// How the volunteers and the paths to them are.
    #[command(after_help = examples::STATUS)]
    Status(TestnetStatusArgs),
    /// Kill a volunteer, as a crash or a power cut would.
    #[command(after_help = examples::KILL)]
    Kill(NodeArgs),
    /// Stop a volunteer in its tracks: it keeps its connections and answers nothing.
    #[command(after_help = examples::PAUSE)]
    Pause(NodeArgs),
    /// Let a paused or slowed volunteer go on.
    #[command(after_help = examples::RESUME)]
    Resume(NodeArgs),
    /// Start a volunteer again, with the same identity.
    #[command(after_help = examples::RESTART)]
    Restart(NodeArgs),
    /// Let a volunteer run a part of the time only.
    #[command(after_help = examples::SLOW)]
    Slow(SlowArgs),
    /// Let nothing through to a volunteer's data plane, or from it; both ways without --to and --from.
    #[command(after_help = examples::CUT)]
    Cut(CutArgs),
    /// Undo all trouble.
    #[command(after_help = examples::HEAL)]
    Heal(OrderArgs),
    /// End the network.
    #[command(after_help = examples::DOWN)]
    Down(OrderArgs),
    /// Start a network of unequal volunteers, break it under load, and check every token.
    #[command(after_help = examples::CHAOS)]
    Chaos(ChaosArgs),
}

/// Which network is meant.
#[derive(Debug, Args)]
pub(crate) struct OrderArgs {
    /// The folder that `up` was given; by default one of the user's runtime or temporary folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
}

/// Which volunteer is meant.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The volunteer's number, from 0.
    #[arg(value_name = "N")]
    pub(crate) node: usize,
    #[command(flatten)]
    pub(crate) order: OrderArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SlowArgs {
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    /// How many times slower.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=40))]
    pub(crate) times: u32,
}

#[derive(Debug, Args)]
pub(crate) struct CutArgs {
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    /// Only what goes to it.
    #[arg(long)]
    pub(crate) to: bool,
    /// Only what comes from it.
    #[arg(long)]
    pub(crate) from: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TestnetStatusArgs {
    #[command(flatten)]
    pub(crate) order: OrderArgs,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// A model folder; by default the small model that comes with the source.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// How many volunteer processes to start.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) nodes: u16,
    /// How many volunteers host each expert.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) replicas: u16,
    /// Give the volunteers unequal shares, drawn from this seed.
    #[arg(long, value_name = "SEED")]
    pub(crate) unequal: Option<u64>,
    /// Round trip to be added to the path to every volunteer's data plane, such as 20ms.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) rtt: Duration,
    /// By how much the round trip may be longer.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) jitter: Duration,
    /// Share of the packets that are lost in each direction, such as 1%.
    #[arg(long, default_value = "0%", value_name = "SHARE", value_parser = parse_share)]
    pub(crate) loss: f64,
    /// Kill a volunteer this often, and start it again half way to the next.
    #[arg(long, value_name = "TIME", value_parser = parse_interval)]
    pub(crate) kill_every: Option<Duration>,
    /// For the losses and delays: the same seed loses the same packets.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: u64,
    /// Where the other commands find the network; by default a folder in the user's runtime or temporary folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// One JSON line on standard output when the network is up.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ChaosArgs {
    /// A model folder; by default the small model that comes with the source.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// How long in all; the first sixth is peace, to compare with.
    #[arg(long, default_value_t = 180, value_name = "N", value_parser = clap::value_parser!(u64).range(10..=86_400))]
    pub(crate) seconds: u64,
    /// Decides who is how large and what happens to whom; by default another one each time.
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
    /// How many volunteer processes to start.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(3..=64))]
    pub(crate) nodes: u16,
    /// How many volunteers host each expert.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=63))]
    pub(crate) replicas: u16,
    /// Generations at a time.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) streams: u16,
    /// Round trip to be added to the path to every volunteer's data plane, such as 20ms.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) rtt: Duration,
    /// By how much the round trip may be longer.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) jitter: Duration,
    /// Share of the packets that are lost in each direction, such as 1%.
    #[arg(long, default_value = "0%", value_name = "SHARE", value_parser = parse_share)]
    pub(crate) loss: f64,
    /// One JSON document on standard output and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `1%` or `0.01`.
fn parse_share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    let share = number.trim().parse::<f64>().map_err(|e| e.to_string())? / unit;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("it is between 0% and 100%".to_owned()) }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    if interval < Duration::from_secs(1) { Err("it is at least 1s".to_owned()) } else { Ok(interval) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_percentage_or_a_fraction() {
        assert_eq!(parse_share("1%"), Ok(0.01));
        assert_eq!(parse_share("0.25"), Ok(0.25));
        for wrong in ["101%", "-1%", "2", "NaN", "x", "%"] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
    }
}
