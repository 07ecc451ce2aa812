//! QUIC settings of the data plane, each with its reason.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig,
    VarInt,
};

use super::congestion;

/// Application error code of a connection closed in the ordinary way.
pub(super) const CLOSED: VarInt = VarInt::from_u32(0);
/// Code with which a stream is reset and stopped when nobody waits for its answer any more.
pub(super) const CANCELLED: VarInt = VarInt::from_u32(1);
/// Code with which a stream is ended after a refusal that leaves it unusable.
pub(super) const REFUSED: VarInt = VarInt::from_u32(2);

/// Streams that the other side may have open at a time: its outstanding calls, and the warm streams it keeps. Bounds the work and
/// the memory that one connection can ask for.
const STREAMS: u32 = 256;
/// Unread bytes accepted on one stream: the bandwidth-delay product of 300 Mbit/s at 100 ms.
const STREAM_WINDOW: u32 = 4 << 20;
/// Unread bytes accepted on all streams of a connection, and so the memory that a stranger can fill without any call being read.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// The same for those who come when many are connected: a thousand of them can fill 1 GiB, not 16.
const CROWDED_WINDOW: u32 = 1 << 20;
/// Bytes that the system keeps of what arrives or leaves, where it allows so many. With the usual 208 KiB the answers of several peers to
/// one large call are more than the socket takes, and what it drops is sent again after a timeout.
pub(super) const SOCKET_BUFFER: usize = 4 << 20;
/// Bytes sent before the first acknowledgement. With QUIC's usual 14 KiB a call of 64 KiB over 40 ms takes three round trips, and
/// request and response traffic never grows the window; with this it takes one. Not larger: a burst of 1 MiB drowns a thin uplink.
const INITIAL_WINDOW: u64 = 256 << 10;
/// Bytes of a datagram at most, where the path takes so many: loopback, and Ethernet with jumbo frames. quinn hands ten of them to the system at
/// once (`MAX_TRANSMIT_SEGMENTS`), which takes 65,507 bytes at most and says so in a way that quinn holds for a probe of the path: anything more
/// is never sent, and comes 100 ms late.
const DATAGRAM: u16 = 65_507 / 10;
/// Shorter than the 15 to 30 s after which home routers forget an idle UDP mapping, and less than half of [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A peer not heard of for so long is gone: two keep-alives may be lost.
const IDLE: VarInt = VarInt::from_u32(15_000); // milliseconds
/// The other side keeps an acknowledgement back for so long at most, for an answer to carry it. A sender whose last packet was lost waits for
/// it, too, before it asks: with QUIC's 25 ms that is more than the round trip of a path within a country.
const ACK_DELAY: Duration = Duration::from_millis(5);
/// Packets that are not acknowledged at once: as many as are handed to the system together. With QUIC's 1 a call of few packets is
/// acknowledged before its answer does that, which costs both sides a system call.
const ACK_AFTER: VarInt = VarInt::from_u32(10);
/// Handshakes waiting to be accepted.
const MAX_INCOMING: usize = 256;
/// Bytes buffered for each of them, and for all together.
const INCOMING_BUFFER: u64 = 64 << 10;
const INCOMING_BUFFER_TOTAL: u64 = 8 << 20;

/// Of every endpoint.
pub(super) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(DATAGRAM).expect("a valid size");
    config
}

/// For connections we dial.
pub(super) fn client(crypto: Arc<dyn quinn::crypto::ClientConfig>) -> ClientConfig {
    let mut config = ClientConfig::new(crypto);
    config.transport_config(Arc::new(transport()));
    config
}

/// For connections we are dialled on.
pub(super) fn server(crypto: Arc<dyn quinn::crypto::ServerConfig>) -> ServerConfig {
    serving(crypto, transport())
}

/// The same when many are connected already.
pub(super) fn crowded_server(crypto: Arc<dyn quinn::crypto::ServerConfig>) -> ServerConfig {
    let mut transport = transport();
    transport.stream_receive_window(CROWDED_WINDOW.into()).receive_window(CROWDED_WINDOW.into());
    serving(crypto, transport)
}

fn serving(crypto: Arc<dyn quinn::crypto::ServerConfig>, transport: TransportConfig) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(crypto);
    config
        .transport_config(Arc::new(transport))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    config
}

fn transport() -> TransportConfig {
    // On top of Cubic rather than BBR: quinn's BBR is experimental and lost many packets on this traffic.
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(DATAGRAM);
    let mut acks = AckFrequencyConfig::default();
    // A gap is told at once, as it is without the extension.
    acks.max_ack_delay(Some(ACK_DELAY)).ack_eliciting_threshold(ACK_AFTER).reordering_threshold(1u32.into());
    let mut config = TransportConfig::default();
    config
        .ack_frequency_config(Some(acks))
        .max_concurrent_bidi_streams(STREAMS.into())
        // The protocol uses neither.
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(CONNECTION_WINDOW.into())
        .congestion_controller_factory(Arc::new(congestion::Factory(Arc::new(cubic))))
        .mtu_discovery_config(Some(mtu))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(IDLE)))
        // Many packets to one system call: 2.6 to 3.4 times the throughput on loopback. The default, but too important to be left to it.
        .enable_segmentation_offload(true);
    config
}
