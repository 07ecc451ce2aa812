//! The data plane: QUIC connections whose TLS proves the peer id on both sides, and frames on their streams.

mod call;
mod carrier;
mod congestion;
mod connection;
mod runtime;
mod settings;
mod stream;
mod streams;
mod tls;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libp2p::PeerId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, Incoming, ServerConfig, TokioRuntime};
use socket2::SockRef;

use crate::Identity;

pub use call::CallError;
pub use carrier::Path;
pub use connection::DataConnection;
pub use runtime::data_runtime;
pub use stream::FrameStream;

/// The application protocol both sides must offer in TLS.
pub const ALPN: &[u8] = b"hanse/1";

/// Connections an endpoint holds at a time; more are refused.
const MAX_CONNECTIONS: usize = 1024;
/// From so many connections on, a stranger must first show that it receives at the address it sends from, and may have less unread.
const CROWDED_FROM: usize = 64;
/// How long a closing endpoint waits for the other sides to hear of it.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// A UDP socket that dials peers and is dialled by them. Clones share the socket.
#[derive(Debug, Clone)]
pub struct DataEndpoint {
    endpoint: Endpoint,
    tls: Arc<tls::Tls>,
    /// For those who dial when many are connected.
    crowded: Arc<ServerConfig>,
}

/// Why the endpoint could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The address is taken, or not one of this machine.
    #[error("cannot bind UDP address {address}")]
    Socket {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The TLS certificate cannot be made.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// Why a peer could not be dialled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Someone else answers at that address. Do not use it for this peer again.
    #[error("{address} belongs to peer {found}, not to {expected}")]
    WrongPeer {
        /// The address dialled.
        address: SocketAddr,
        /// Who should answer.
        expected: PeerId,
        /// Who did.
        found: PeerId,
    },
    /// No handshake in time. Try another address or peer.
    #[error("{address} did not complete the handshake within {after:?}")]
    Timeout {
        /// The address dialled.
        address: SocketAddr,
        /// The time it had.
        after: Duration,
    },
    /// The address cannot be dialled from this endpoint, for instance IPv6 from an IPv4 socket.
    #[error("{address} cannot be dialled: {reason}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// Why not.
        reason: String,
    },
    /// The other side refused or broke the handshake, or speaks another protocol.
    #[error("the handshake with {address} failed: {reason}")]
    Handshake {
        /// The address dialled.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
}

/// Why an incoming connection came to nothing. The other side's fault, or it went away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstablishError {
    /// No handshake in time.
    #[error("{address} did not complete the handshake within {after:?}")]
    Timeout {
        /// Where it came from.
        address: SocketAddr,
        /// The time it had.
        after: Duration,
    },
    /// The handshake failed.
    #[error("the handshake with {address} failed: {reason}")]
    Handshake {
        /// Where it came from.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
}

impl DataEndpoint {
    /// Opens a UDP socket at `address` (port 0 for any) and listens on it in the name of `identity`.
    ///
    /// # Errors
    /// [`BindError`], as its variants say.
    pub fn bind(identity: &Identity, address: SocketAddr) -> Result<Self, BindError> {
        let tls_failed = |error: &dyn std::fmt::Display| BindError::Tls(error.to_string());
        let tls = tls::Tls::new(identity).map_err(|e| tls_failed(&e))?;
        let crypto = tls.server().map_err(|e| tls_failed(&e))?;
        let crypto = Arc::new(QuicServerConfig::try_from(crypto).map_err(|e| tls_failed(&e))?);
        let socket_failed = |source| BindError::Socket { address, source };
        let socket = std::net::UdpSocket::bind(address).map_err(socket_failed)?;
        // The system may give less; that is no reason not to go on.
        let _ = SockRef::from(&socket).set_recv_buffer_size(settings::SOCKET_BUFFER);
        let _ = SockRef::from(&socket).set_send_buffer_size(settings::SOCKET_BUFFER);
        let crowded = Arc::new(settings::crowded_server(crypto.clone()));
        let _entered = data_runtime().enter();
        let endpoint =
            Endpoint::new(settings::endpoint(), Some(settings::server(crypto)), socket, Arc::new(TokioRuntime))
                .map_err(socket_failed)?;
        Ok(Self { endpoint, tls: Arc::new(tls), crowded })
    }

    /// The address of the socket, with the port that the system chose.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Dials `peer` at `address`. Whoever cannot prove to be `peer` learns nothing of this side's identity.
    ///
    /// A dropped future leaves nothing behind.
    ///
    /// # Errors
    /// [`ConnectError`], as its variants say.
    pub async fn connect(
        &self,
        peer: PeerId,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<DataConnection, ConnectError> {
        let handshake = |reason: String| ConnectError::Handshake { address, reason };
        let found = Arc::new(OnceLock::new());
        let crypto = self.tls.client(peer, found.clone()).map_err(|e| handshake(e.to_string()))?;
        let crypto = QuicClientConfig::try_from(crypto).map_err(|e| handshake(e.to_string()))?;
        let settings = settings::client(Arc::new(crypto));
        let connecting = {
            let _entered = data_runtime().enter();
            self.endpoint.connect_with(settings, address, tls::SERVER_NAME)
        };
        let connecting = connecting.map_err(|error| ConnectError::Address { address, reason: error.to_string() })?;
        match tokio::time::timeout(timeout, connecting).await {
            Err(_) => Err(ConnectError::Timeout { address, after: timeout }),
            Ok(Ok(connection)) => Ok(DataConnection::new(connection, peer)),
            Ok(Err(error)) => Err(match found.get() {
                Some(found) if *found != peer => ConnectError::WrongPeer { address, expected: peer, found: *found },
                _ => handshake(error.to_string()),
            }),
        }
    }

    /// The next one who dials, before its handshake; `None` once the endpoint is closed.
    ///
    /// Establish it in a task of its own, so that a slow handshake keeps nobody else waiting. A dropped future loses nothing.
    pub async fn accept(&self) -> Option<PendingConnection> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let open = self.endpoint.open_connections();
            if open >= MAX_CONNECTIONS {
                tracing::debug!(address = %incoming.remote_address(), open, "too many connections: refused one");
                incoming.refuse();
            } else if open >= CROWDED_FROM && incoming.may_retry() && !incoming.remote_address_validated() {
                // It cannot fail where `may_retry` holds.
                let _ = incoming.retry();
            } else {
                let settings = (open >= CROWDED_FROM).then(|| self.crowded.clone());
                return Some(PendingConnection { incoming, settings });
            }
        }
    }

    /// Closes all connections, tells the other sides, and stops listening. Waits at most two seconds for that.
    pub async fn close(&self) {
        self.endpoint.close(settings::CLOSED, b"the endpoint was closed");
        // Those who have not heard by then will find out by their idle timeout.
        let _ = tokio::time::timeout(CLOSE_TIME, self.endpoint.wait_idle()).await;
    }
}

/// Someone who dialled and has not yet proved who it is.
#[derive(Debug)]
pub struct PendingConnection {
    incoming: Incoming,
    /// `None` for the usual ones.
    settings: Option<Arc<ServerConfig>>,
}

impl PendingConnection {
    /// Where it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Completes the handshake, which proves the other side's peer id; whether it is welcome is for the caller to say.
    ///
    /// # Errors
    /// [`EstablishError`], as its variants say.
    pub async fn establish(self, timeout: Duration) -> Result<DataConnection, EstablishError> {
        let address = self.incoming.remote_address();
        let failed = |reason: String| EstablishError::Handshake { address, reason };
        let connecting = {
            let _entered = data_runtime().enter();
            match self.settings {
                Some(settings) => self.incoming.accept_with(settings),
                None => self.incoming.accept(),
            }
        };
        let connecting = connecting.map_err(|error| failed(error.to_string()))?;
        let connection = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| EstablishError::Timeout { address, after: timeout })?
            .map_err(|error| failed(error.to_string()))?;
        let peer_id = tls::peer_id(&connection).ok_or_else(|| failed("it showed no certificate".into()))?;
        Ok(DataConnection::new(connection, peer_id))
    }
}
