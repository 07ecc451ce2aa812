//! How a volunteer takes part.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hanse_model::DeviceChoice;
use hanse_protocol::Multiaddr;
use hanse_protocol::discovery::ReachConfig;
use hanse_protocol::discovery::keys::DEFAULT_NETWORK;
use hanse_router::weights::{RemoteModel, Shelf};

use crate::experts_spec::ExpertsSpec;
use crate::placement::Pace;

/// Ten minutes of calls say more about what is wanted than the last question.
const DEMAND_HALF_LIFE: Duration = Duration::from_secs(600);

/// Which experts to host.
#[derive(Debug, Clone)]
pub enum Hosting {
    /// These.
    Experts(ExpertsSpec),
    /// As many as fit into so many bytes, and onto the devices, rarest in the network first.
    MemoryBytes(u64),
}

/// How a volunteer takes part.
#[derive(Debug, Clone)]
pub struct VolunteerConfig {
    /// The network's name.
    pub network: String,
    /// Control-plane addresses to listen on.
    pub listen: Vec<Multiaddr>,
    /// The data plane's address; `None` takes a free UDP port on the address of the first of `listen`.
    pub data_listen: Option<SocketAddr>,
    /// Data-plane addresses to announce in place of the bound ones: where others reach this node through a port forwarding.
    pub advertise: Vec<SocketAddr>,
    /// Members to join through; none for the first member of a network.
    pub bootstrap: Vec<Multiaddr>,
    /// Whether to look for members on the local network by multicast DNS.
    pub mdns: bool,
    /// How to deal with home routers.
    pub reach: ReachConfig,
    /// Which experts to host.
    pub hosting: Hosting,
    /// What holds experts and computes them. Several devices are one volunteer.
    pub device: DeviceChoice,
    /// Computing threads, where the processor computes; 0 takes one per core.
    pub threads: usize,
    /// With [`Hosting::MemoryBytes`]: how fast capacity moves to where it is missed.
    pub pace: Pace,
    /// Bytes of answers and weights sent in a second at most; `None` for as many as the line takes.
    pub max_bandwidth: Option<u64>,
    /// In this time half of the demand for an expert is forgotten.
    pub demand_half_life: Duration,
    /// Keep the files of hosted experts in the cache, so that experts of a device that was lent can be loaded again.
    pub keep_files: bool,
    /// What fetches the checkpoint's experts; `None` if it is a folder. Then they are fetched several at a time, ahead of being
    /// loaded.
    pub remote: Option<RemoteModel>,
    /// The model's manifest and weights, to be given to those who ask for them; `None` gives out nothing.
    pub shelf: Option<Arc<Shelf>>,
    /// Bytes of weights given out per second; `None` for as many as answers leave of `max_bandwidth`.
    pub give_bytes_per_second: Option<u64>,
}

impl Default for VolunteerConfig {
    /// All experts, computed by the processor, on free loopback ports, alone.
    fn default() -> Self {
        let loopback = Multiaddr::from(Ipv4Addr::LOCALHOST);
        let quic = loopback
            .with(hanse_protocol::multiaddr::Protocol::Udp(0))
            .with(hanse_protocol::multiaddr::Protocol::QuicV1);
        Self {
            network: DEFAULT_NETWORK.to_owned(),
            listen: vec![quic],
            data_listen: None,
            advertise: Vec::new(),
            bootstrap: Vec::new(),
            mdns: false,
            reach: ReachConfig::default(),
            hosting: Hosting::Experts(ExpertsSpec::All),
            device: DeviceChoice::Cpu,
            threads: 0,
            pace: Pace::default(),
            max_bandwidth: None,
            demand_half_life: DEMAND_HALF_LIFE,
            keep_files: false,
            remote: None,
            shelf: None,
            give_bytes_per_second: None,
        }
    }
}

/// A free port on the address of the first control-plane listener that has one.
pub(super) fn default_data_address(listen: &[Multiaddr]) -> SocketAddr {
    let ip = listen.iter().find_map(ip_of).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    SocketAddr::new(ip, 0)
}

pub(super) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    use hanse_protocol::multiaddr::Protocol;
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
        _ => None,
    })
}
