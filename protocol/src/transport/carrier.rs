//! What carries the streams of a connection: the data plane's own QUIC, or a connection of the control plane.

use std::net::SocketAddr;
use std::time::Duration;

use libp2p::Multiaddr;
use quinn::Connection;
use tokio_util::sync::CancellationToken;

use super::settings::CLOSED;
use super::streams::Streams;
use crate::relayed::Lane;

/// By which way a peer is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// The data plane's own QUIC, at the peer's address.
    Data(SocketAddr),
    /// A direct connection of the control plane, dialled or hole-punched, at the peer's address.
    Control(Multiaddr),
    /// Through a relay, by the circuit's address.
    Relayed(Multiaddr),
}

impl Path {
    /// Whether a third member carries the frames.
    #[must_use]
    pub fn is_relayed(&self) -> bool {
        matches!(self, Self::Relayed(_))
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Data(address) => address.fmt(f),
            Self::Control(address) | Self::Relayed(address) => address.fmt(f),
        }
    }
}

#[derive(Debug)]
pub(super) enum Carrier {
    Quic(Connection),
    /// The libp2p connection serves the control plane too, and outlives the data connection: `closed` ends only the latter.
    Lane {
        lane: Lane,
        closed: CancellationToken,
    },
}

const CLOSED_HERE: &str = "closed on this side";

impl Carrier {
    pub(super) async fn open(&self) -> Result<Streams, String> {
        match self {
            Self::Quic(connection) => {
                let (send, recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
                Ok(Streams::Quic(send, recv))
            }
            Self::Lane { lane, closed } => tokio::select! {
                opened = lane.open() => {
                    let (stream, lane) = opened?;
                    Ok(Streams::libp2p(stream, lane, closed.clone()))
                }
                () = closed.cancelled() => Err(CLOSED_HERE.into()),
            },
        }
    }

    /// `None` once the connection is closed. Cancel safe.
    pub(super) async fn accept(&self) -> Option<Streams> {
        match self {
            Self::Quic(connection) => {
                let (send, recv) = connection.accept_bi().await.ok()?;
                Some(Streams::Quic(send, recv))
            }
            Self::Lane { lane, closed } => tokio::select! {
                accepted = lane.accept() => Some(Streams::libp2p(accepted?, lane.clone(), closed.clone())),
                () = closed.cancelled() => None,
            },
        }
    }

    pub(super) async fn closed(&self) -> String {
        match self {
            Self::Quic(connection) => connection.closed().await.to_string(),
            Self::Lane { lane, closed } => tokio::select! {
                () = lane.closed() => lane.close_reason(),
                () = closed.cancelled() => CLOSED_HERE.into(),
            },
        }
    }

    pub(super) fn close_reason(&self) -> Option<String> {
        match self {
            Self::Quic(connection) => connection.close_reason().map(|reason| reason.to_string()),
            Self::Lane { closed, .. } if closed.is_cancelled() => Some(CLOSED_HERE.into()),
            Self::Lane { lane, .. } => lane.is_closed().then(|| lane.close_reason()),
        }
    }

    pub(super) fn round_trip(&self) -> Duration {
        match self {
            Self::Quic(connection) => connection.rtt(),
            Self::Lane { lane, .. } => lane.round_trip(),
        }
    }

    pub(super) fn path(&self) -> Path {
        match self {
            // A socket for both versions of IP names an IPv4 address in IPv6 form; adverts do not.
            Self::Quic(connection) => {
                let address = connection.remote_address();
                Path::Data(SocketAddr::new(address.ip().to_canonical(), address.port()))
            }
            Self::Lane { lane, .. } => lane.path(),
        }
    }

    pub(super) fn close(&self, reason: &str) {
        match self {
            Self::Quic(connection) => connection.close(CLOSED, reason.as_bytes()),
            Self::Lane { closed, .. } => closed.cancel(),
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Self::Lane { closed, .. } = self {
            closed.cancel();
        }
    }
}
