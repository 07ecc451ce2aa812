//! The libp2p protocols a member speaks, and their limits.

use std::num::NonZeroUsize;
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, autonat, dcutr, identify, kad, mdns, noise, ping, relay, request_response,
    tcp, yamux,
};

use super::exchange::{ADVERT_PROTOCOL, AdvertCodec};
use super::providers::ProviderStore;
use super::reach::Standing;
use super::relaying::Relay;
use super::retest::AutonatClient;
use super::{DiscoveryConfig, DiscoveryError, in_process, keys};
use crate::{Identity, relayed};

/// Provider records live minutes: a volunteer that vanished is not looked for much longer.
const PROVIDER_TTL: Duration = Duration::from_secs(5 * 60);
/// Control connections carry little; idle ones are closed after this, and dialled again when needed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often members look for others near and far to keep their routing tables full.
const ROUTING_INTERVAL: Duration = Duration::from_secs(2 * 60);
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
const ADVERT_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: u32 = 1024;
/// Over TCP and QUIC, by both sides at once, through a relay, punched, and for AutoNAT's tests.
const MAX_CONNECTIONS_PER_PEER: u32 = 16;
const MAX_PENDING_INCOMING: u32 = 128;
/// Also how fresh a lane's round trip is, which is measured at once when there is a new one. Not more often: a member of a large network
/// has hundreds of connections.
const PING_INTERVAL: Duration = Duration::from_secs(15);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) kad: kad::Behaviour<ProviderStore>,
    pub(crate) identify: identify::Behaviour,
    pub(crate) ping: ping::Behaviour,
    pub(crate) adverts: request_response::Behaviour<AdvertCodec>,
    pub(crate) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(crate) relay: Toggle<Relay>,
    pub(crate) relay_client: relay::client::Behaviour,
    pub(crate) dcutr: Toggle<dcutr::Behaviour>,
    pub(crate) autonat_client: Toggle<AutonatClient>,
    pub(crate) autonat_server: Toggle<autonat::v2::server::Behaviour>,
    pub(crate) frames: relayed::Behaviour,
}

/// The name of the network's DHT protocol: members of other networks do not even negotiate it.
pub(crate) fn kad_protocol(network: &str) -> Result<StreamProtocol, DiscoveryError> {
    if !keys::is_network_name(network) {
        return Err(DiscoveryError::NetworkName(network.to_owned()));
    }
    StreamProtocol::try_from_owned(format!("/hanse/{network}/kad/1"))
        .map_err(|_| DiscoveryError::NetworkName(network.to_owned()))
}

/// What identify's protocol version begins with, before the network's name.
pub(crate) const IDENTIFY_PREFIX: &str = "hanse/1/";

/// How members and clients of a network tell that they are its own.
pub(crate) fn identify_version(network: &str) -> String {
    format!("{IDENTIFY_PREFIX}{network}")
}

pub(crate) fn build_swarm(identity: &Identity, config: &DiscoveryConfig) -> Result<Swarm<Behaviour>, DiscoveryError> {
    let setup = |e: &dyn std::fmt::Display| DiscoveryError::Setup(e.to_string());
    let protocol = kad_protocol(&config.network)?;
    let behaviour = |relay_client| behaviour(identity, config, protocol, relay_client).map_err(BoxError::from);
    let builder = SwarmBuilder::with_existing_identity(identity.keypair().clone()).with_tokio();
    // The two differ in type until they are built.
    let swarm = match &config.in_process {
        None => builder
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
            .map_err(|e| setup(&e))?
            .with_quic()
            .with_relay_client(noise::Config::new, yamux::Config::default)
            .map_err(|e| setup(&e))?
            .with_behaviour(|_, relay_client| behaviour(relay_client))
            .map_err(|e| setup(&e))?
            .with_swarm_config(|swarm| swarm.with_idle_connection_timeout(IDLE_TIMEOUT))
            .build(),
        Some(traffic) => builder
            .with_other_transport(|keypair| in_process::transport(keypair, traffic.clone()).map_err(BoxError::from))
            .map_err(|e| setup(&e))?
            .with_relay_client(noise::Config::new, yamux::Config::default)
            .map_err(|e| setup(&e))?
            .with_behaviour(|_, relay_client| behaviour(relay_client))
            .map_err(|e| setup(&e))?
            .with_swarm_config(|swarm| swarm.with_idle_connection_timeout(IDLE_TIMEOUT))
            .build(),
    };
    Ok(swarm)
}

fn behaviour(
    identity: &Identity,
    config: &DiscoveryConfig,
    protocol: StreamProtocol,
    relay_client: relay::client::Behaviour,
) -> std::io::Result<Behaviour> {
    let peer_id = identity.peer_id();
    let standing = Standing::of(config);
    let serves = standing != Standing::Client;
    let unconfirmed = standing == Standing::Unconfirmed;

    let mut kad_config = kad::Config::new(protocol);
    kad_config
        .set_provider_record_ttl(Some(PROVIDER_TTL))
        // Publishing again is ours (see the task): it also happens when new peers appear.
        .set_provider_publication_interval(None)
        .set_query_timeout(QUERY_TIMEOUT)
        .set_periodic_bootstrap_interval(Some(ROUTING_INTERVAL));
    if let Some(parallelism) = NonZeroUsize::new(8) {
        // Members that crashed stay in routing tables for a while; more look-ups at once step over them sooner.
        kad_config.set_parallelism(parallelism);
    }
    let mut kad = kad::Behaviour::with_config(peer_id, ProviderStore::new(peer_id), kad_config);
    kad.set_mode(Some(if standing == Standing::Reachable { kad::Mode::Server } else { kad::Mode::Client }));

    let limits = ConnectionLimits::default()
        .with_max_established(Some(MAX_CONNECTIONS))
        .with_max_established_per_peer(Some(MAX_CONNECTIONS_PER_PEER))
        .with_max_pending_incoming(Some(MAX_PENDING_INCOMING));
    let support =
        if serves { request_response::ProtocolSupport::Full } else { request_response::ProtocolSupport::Outbound };
    let mdns = if config.mdns { Some(mdns::tokio::Behaviour::new(mdns::Config::default(), peer_id)?) } else { None };
    // It is offered once this member is known to be reachable.
    let relay = (serves && config.reach.serve_relay).then(|| Relay::new(peer_id, &config.reach.relay_limits));
    Ok(Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        kad,
        identify: identify::Behaviour::new(
            identify::Config::new(identify_version(&config.network), identity.keypair().public())
                .with_agent_version(concat!("hanse/", env!("CARGO_PKG_VERSION")).to_owned())
                .with_push_listen_addr_updates(true),
        ),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL)),
        adverts: request_response::Behaviour::with_codec(
            AdvertCodec,
            [(ADVERT_PROTOCOL, support)],
            request_response::Config::default().with_request_timeout(ADVERT_TIMEOUT),
        ),
        mdns: Toggle::from(mdns),
        relay: Toggle::from(relay),
        relay_client,
        dcutr: Toggle::from(config.reach.punch.then(|| dcutr::Behaviour::new(peer_id))),
        autonat_client: Toggle::from(unconfirmed.then(AutonatClient::default)),
        autonat_server: Toggle::from(serves.then(autonat::v2::server::Behaviour::default)),
        frames: relayed::Behaviour::new(serves),
    })
}
