//! What the command line understands.

mod bench;
mod convert;
mod draft;
mod examples;
mod gateway;
mod limits;
mod look;
mod quantize;
#[cfg(unix)]
mod testnet;
mod text;
mod tools;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use bench::{BenchArgs, BenchPart, CurveName};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
pub(crate) use convert::{CarveArgs, FloatDtype, ImportArgs};
pub(crate) use draft::DraftArgs;
pub(crate) use gateway::GatewayArgs;
use hanse_model::{DeviceChoice, DeviceChoiceError};
use hanse_node::ExpertsSpec;
use hanse_protocol::discovery::keys::{DEFAULT_NETWORK, MAX_NETWORK_NAME, is_network_name};
use hanse_protocol::{Combine, Multiaddr, WireDtype};
use hanse_router::weights::Repository;
use hanse_router::{NetworkConfig, PrecisionPolicy};
pub(crate) use limits::{ControlArgs, LimitArgs};
pub(crate) use look::{InspectArgs, ManifestArgs, StatusArgs};
pub(crate) use quantize::QuantizeArgs;
#[cfg(unix)]
pub(crate) use testnet::{ChaosArgs, OrderArgs, TestnetCommand, TestnetStatusArgs, UpArgs};
pub(crate) use text::{ChatArgs, DemoArgs, GenerateArgs, SamplingArgs, ScoreArgs};
pub(crate) use tools::{CompletionsArgs, DoctorArgs, ManArgs};

use crate::model::ModelRef;

/// Where a node listens by default: free ports on all addresses.
const LISTEN: [&str; 2] = ["/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/tcp/0"];

/// Serve one large mixture-of-experts model from many small machines.
#[derive(Debug, Parser)]
#[command(name = "hanse", version, propagate_version = true, max_term_width = 100, after_help = examples::HANSE)]
pub(crate) struct Cli {
    /// Say more on standard error; repeat for more (HANSE_LOG=FILTER says exactly what).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a small network on this machine, generate over it, and compare with one process that holds everything.
    Demo(DemoArgs),
    /// Volunteer: host experts of a model and serve them.
    Node(NodeArgs),
    /// Have the node that runs on this machine take no calls until `hanse resume`.
    #[command(after_help = examples::PAUSE)]
    Pause(ControlArgs),
    /// Have a paused node take calls again.
    #[command(after_help = examples::RESUME)]
    Resume(ControlArgs),
    /// Whether the node that runs on this machine has loaded what it is to host: exit code 0, and 1 until then.
    #[command(after_help = examples::READY)]
    Ready(ControlArgs),
    /// Continue a prompt.
    Generate(GenerateArgs),
    /// Talk with a model.
    Chat(ChatArgs),
    /// Serve a model by HTTP, as OpenAI does: chat, completions, tools, JSON schemas.
    Gateway(GatewayArgs),
    /// Log probabilities and perplexity of a text.
    Score(ScoreArgs),
    /// What a network hosts: coverage per layer, replicas, peers.
    Status(StatusArgs),
    /// Whether this machine can take part, and what to do where it cannot: key, disk, port, who answers, NAT, clock.
    Doctor(DoctorArgs),
    /// What a model folder holds: trunk, experts, sizes.
    Inspect(InspectArgs),
    /// Write a model folder's manifest: every part of the model by its hash, signed.
    Manifest(ManifestArgs),
    /// Write a model folder again with weights in fewer bits.
    Quantize(QuantizeArgs),
    /// Make slices of a dense model's feed-forward layers, so that volunteers can share them like experts.
    Carve(CarveArgs),
    /// Make a model folder of a GGUF file.
    Import(ImportArgs),
    /// Measure on this machine: the price of distribution, one expert call, memory.
    Bench(BenchArgs),
    /// What a shell needs to complete commands and options.
    Completions(CompletionsArgs),
    /// Manual pages.
    Man(ManArgs),
    /// A network of volunteer processes on this machine, and trouble for it.
    #[cfg(unix)]
    #[command(subcommand, after_help = examples::testnet::TESTNET)]
    Testnet(TestnetCommand),
}

/// The model and who computes its experts.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// A Hugging Face model folder; or a model's id, whose trunk is then fetched from the network; or hf:org/name, a
    /// repository with a manifest.
    #[arg(long, value_name = "DIR|ID|hf:REPO")]
    pub(crate) model: ModelRef,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// Compute the experts in this process as well: the reference for what a network gives.
    #[arg(long, conflicts_with = "bootstrap")]
    pub(crate) local: bool,
    #[command(flatten)]
    pub(crate) join: JoinArgs,
    /// Encoding of hidden states on the wire: f32 (exact), f16 or bf16 (half the bytes), int8 (a bit more than a quarter).
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    pub(crate) wire: WireDtype,
    /// Which experts are accepted beside those of the model itself, of peers that host a variant which `hanse quantize` made of it: `exact` for
    /// none, `q8` for weights of eight bits or more, `any`. Each expert is asked for in one precision as long as somebody hosts it so; the
    /// summary says which were used, and whether one changed.
    #[arg(long, value_enum, default_value_t = PrecisionKind::Exact, value_name = "WHICH")]
    pub(crate) precision: PrecisionKind,
    /// Who adds the experts' rows up: `client` (the same bits whoever computes) or `peer` (fewest bytes). By default
    /// client with f32, peer with the others.
    #[arg(long, value_name = "WHO", value_parser = parse_combine)]
    pub(crate) combine: Option<Combine>,
    /// What multiplies with the trunk's matrices, to the same bits: `cpu`; one NVIDIA card such as cuda:0; `metal` for the GPU of a machine
    /// by Apple; `auto` for the card with most free memory if there is one and this build can use it. Where the card has no room, and
    /// once it has failed, the processor does.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", value_parser = trunk_device)]
    pub(crate) device: DeviceChoice,
    /// Threads for the trunk; 0 takes one per core.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = threads)]
    pub(crate) threads: usize,
    /// What happens to an expert that has had no host for --patience: `none` fails and names it, `local` computes it here from
    /// the model folder, `fetch` computes it here too and fetches its weights, where there is no folder, from whoever gives
    /// them: members that do not compute it, or a --source.
    #[arg(long, value_enum, default_value_t = FallbackKind::None, value_name = "KIND")]
    pub(crate) fallback: FallbackKind,
    /// Seconds to wait for a host of an expert to come back.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(crate) patience: u64,
    /// Seconds that joining the network may take.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) join_timeout: u64,
}

/// Which variants of a model are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionKind {
    Exact,
    Q8,
    Any,
}

impl From<PrecisionKind> for PrecisionPolicy {
    fn from(kind: PrecisionKind) -> Self {
        match kind {
            PrecisionKind::Exact => Self::Exact,
            PrecisionKind::Q8 => Self::EightBits,
            PrecisionKind::Any => Self::Any,
        }
    }
}

/// Who computes an expert that no peer hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FallbackKind {
    None,
    Local,
    Fetch,
}

/// Where fetched weights are kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct CacheArgs {
    /// Where fetched weights are kept; by default hanse/weights in the user's cache folder. Several processes may share it.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// The most that is kept there, such as 40GiB: what was not used for the longest time is removed. No limit by default.
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache_size: Option<bytesize::ByteSize>,
    /// A repository that holds the model's weights, such as hf:org/name or hf:org/name@revision: with a model's id, they are read
    /// from there as well as from members. HF_ENDPOINT and HF_TOKEN are heeded. May be given more than once.
    #[arg(long, value_name = "REPOSITORY")]
    pub(crate) source: Vec<Repository>,
}

/// How to find a network.
#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// A member to join through, such as /ip4/192.0.2.7/udp/4001/quic-v1/p2p/12D3...; may be given more than once.
    #[arg(long, value_name = "ADDR", num_args = 1..)]
    pub(crate) bootstrap: Vec<Multiaddr>,
    /// The network's name.
    #[arg(long, default_value = DEFAULT_NETWORK, value_name = "NAME", value_parser = network_name)]
    pub(crate) network: String,
    /// Look for members on the local network too (multicast DNS).
    #[arg(long)]
    pub(crate) mdns: bool,
}

impl ClientArgs {
    pub(crate) fn network_config(&self) -> NetworkConfig {
        NetworkConfig {
            network: self.join.network.clone(),
            bootstrap: self.join.bootstrap.clone(),
            mdns: self.join.mdns,
            wire: self.wire,
            combine: self.combine,
            precision: self.precision.into(),
            join_timeout: Duration::from_secs(self.join_timeout),
            replica_patience: Duration::from_secs(self.patience),
            ..NetworkConfig::default()
        }
    }

    /// Whether some way to the network was named.
    pub(crate) fn names_network(&self) -> bool {
        !self.join.bootstrap.is_empty() || self.join.mdns
    }
}

#[derive(Debug, Args)]
#[command(after_help = examples::NODE)]
pub(crate) struct NodeArgs {
    /// A Hugging Face model folder; or a model's id, whose experts are then fetched from the network; or hf:org/name, a
    /// repository with a manifest.
    #[arg(long, value_name = "DIR|ID|hf:REPO")]
    pub(crate) model: ModelRef,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    /// Fetch the trunk too, and give it to clients that have no model folder. A node with a folder always does.
    #[arg(long)]
    pub(crate) keep_trunk: bool,
    /// Give no weights to others.
    #[arg(long)]
    pub(crate) give_no_weights: bool,
    /// The most bytes of weights given to others per second, such as 10MiB.
    #[arg(long, value_name = "SIZE", conflicts_with = "give_no_weights")]
    pub(crate) give_rate: Option<bytesize::ByteSize>,
    /// Which experts to host: `all`, or layers and experts such as 0-3:0-31,5:7. Without this and --memory: all.
    #[arg(long, value_name = "SPEC", conflicts_with = "memory")]
    pub(crate) experts: Option<ExpertsSpec>,
    /// How much memory to give to experts, such as 6GiB: those with the fewest replicas in the network are taken. With --device
    /// cuda it is memory on the cards, all together; what does not fit there is not taken.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<bytesize::ByteSize>,
    /// What holds and computes the experts: `cpu`; `cuda` for all NVIDIA cards of the machine, or some of them such as
    /// cuda:0,cuda:1; `metal` for the GPU of a machine by Apple; `auto` for all cards if there are any and this build can use them, else
    /// the processor.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: DeviceChoice,
    /// Control-plane address to listen on; may be given more than once.
    #[arg(long, value_name = "ADDR", num_args = 1.., default_values = LISTEN)]
    pub(crate) listen: Vec<Multiaddr>,
    /// Data-plane UDP address; by default a free port on the address of the first --listen.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) data_listen: Option<SocketAddr>,
    /// Data-plane address to announce in place of the bound ones, such as a router's forwarded port; may be given more than once.
    #[arg(long, value_name = "IP:PORT", num_args = 1..)]
    pub(crate) advertise: Vec<SocketAddr>,
    /// A member to join through; may be given more than once. None for the first member of a network.
    #[arg(long, value_name = "ADDR", num_args = 1..)]
    pub(crate) bootstrap: Vec<Multiaddr>,
    /// The network's name.
    #[arg(long, default_value = DEFAULT_NETWORK, value_name = "NAME", value_parser = network_name)]
    pub(crate) network: String,
    /// Do not look for members on the local network (multicast DNS). It is never done when listening on loopback only.
    #[arg(long)]
    pub(crate) no_mdns: bool,
    /// Others can dial this node: do not wait until AutoNAT says so.
    #[arg(long)]
    pub(crate) reachable: bool,
    /// Do not relay for nodes behind home routers.
    #[arg(long)]
    pub(crate) no_relay: bool,
    /// Do not ask the home router for a port (UPnP).
    #[arg(long)]
    pub(crate) no_upnp: bool,
    /// Where the identity key is kept; by default hanse in the user's data folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Threads that compute experts, where the processor does; 0 takes one per core.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = threads)]
    pub(crate) threads: usize,
    /// Say which experts would be hosted and why, and do nothing.
    #[arg(long)]
    pub(crate) plan: bool,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// One JSON line on standard output when ready to serve.
    #[arg(long)]
    pub(crate) json: bool,
    /// Leave when standard input closes: for programs that start volunteers and must not leave any behind.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

fn network_name(text: &str) -> Result<String, String> {
    let rule = || format!("use 1 to {MAX_NETWORK_NAME} characters of a-z, 0-9 and -");
    is_network_name(text).then(|| text.to_owned()).ok_or_else(rule)
}

fn threads(text: &str) -> Result<usize, String> {
    let most = 1024;
    text.parse().ok().filter(|&threads| threads <= most).ok_or_else(|| format!("it is not a number of at most {most}"))
}

/// Where a trunk may lie.
fn trunk_device(text: &str) -> Result<DeviceChoice, String> {
    use DeviceChoiceError::{NotAlone, TooMany, Twice};
    let what = match text.parse::<DeviceChoice>() {
        Ok(choice) if choice.is_for_a_trunk() => return Ok(choice),
        Ok(_) | Err(NotAlone(_) | Twice(_) | TooMany) => "a trunk is not divided among devices",
        Err(_) => "it is no device",
    };
    Err(format!("{what}: name auto, cpu, metal, or one card, such as cuda:0"))
}

fn parse_combine(text: &str) -> Result<Combine, String> {
    match text {
        "client" => Ok(Combine::Client),
        "peer" => Ok(Combine::Peer),
        _ => Err("it is `client` or `peer`".to_owned()),
    }
}

/// Ends the process as a wrong argument does: a line that says what is wrong, exit status 2.
pub(crate) fn usage_error(message: &str) -> ! {
    Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit()
}
