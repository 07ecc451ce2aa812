//! One peer: what it says of itself, the connection to it, and how it did.

use std::time::{Duration, Instant};

use hanse_protocol::{Advert, DataConnection, Path, PeerId, Welcome};

use crate::stats::PeerStats;

/// What a way through a relay counts for beyond its round trip: the relay's owner pays for it, and others share it.
const RELAY_PENALTY: Duration = Duration::from_millis(20);

/// Whether a peer can be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum PeerState {
    /// It is called.
    #[serde(rename = "connected")]
    Connected,
    /// It failed or was too late, and is not called before it has answered a probe.
    #[serde(rename = "set aside")]
    SetAside,
    /// It said that it is leaving, and is called only if nobody else can be.
    #[serde(rename = "draining")]
    Draining,
    /// It is known, and was not connected yet.
    #[serde(rename = "connecting")]
    Connecting,
    /// It was connected, and is no more.
    #[serde(rename = "lost")]
    Lost,
}

/// One peer as others may look at it.
#[derive(Debug, Clone)]
pub struct PeerReport {
    /// Who it is.
    pub peer: PeerId,
    /// Whether it can be called.
    pub state: PeerState,
    /// What it last said of itself.
    pub advert: Advert,
    /// The way in use, if connected.
    pub address: Option<Path>,
    /// The connection's smoothed round trip, if connected.
    pub round_trip: Option<Duration>,
    /// This client's own calls to it.
    pub stats: PeerStats,
}

/// A warm connection with what the peer said in its welcome.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) connection: DataConnection,
    /// The way by which it was made.
    pub(crate) path: Path,
    pub(crate) welcome: Welcome,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) advert: Advert,
    pub(super) link: Option<Link>,
    pub(super) stats: PeerStats,
    pub(super) failures_in_a_row: u32,
    /// Set aside until then because it asked for time.
    pub(super) busy_until: Option<Instant>,
    /// Set aside after a failure, until a probe (not before this time) shows that it answers again.
    pub(super) probe_at: Option<Instant>,
    /// When its last connection ended, if it had one and has none now.
    pub(super) lost_at: Option<Instant>,
}

impl Member {
    pub(super) fn state(&self) -> PeerState {
        match &self.link {
            Some(link) if link.connection.is_closed() => PeerState::Lost,
            Some(_) if self.probe_at.is_some() => PeerState::SetAside,
            Some(_) if self.advert.draining.is_some() => PeerState::Draining,
            Some(_) => PeerState::Connected,
            None if self.lost_at.is_some() => PeerState::Lost,
            None => PeerState::Connecting,
        }
    }

    pub(super) fn lose(&mut self) {
        if self.link.take().is_some() {
            self.lost_at = Some(Instant::now());
        }
    }

    pub(super) fn report(&self, peer: PeerId, latest: usize) -> PeerReport {
        PeerReport {
            peer,
            state: self.state(),
            advert: self.advert.clone(),
            address: self.link.as_ref().map(|link| link.path.clone()),
            round_trip: self.link.as_ref().map(|link| link.connection.round_trip()),
            stats: self.stats.latest(latest),
        }
    }

    /// What the connection's round trip counts for; zero when there is no connection.
    pub(super) fn round_trip(&self) -> Duration {
        let Some(link) = &self.link else { return Duration::ZERO };
        let relay = if link.path.is_relayed() { RELAY_PENALTY } else { Duration::ZERO };
        link.connection.round_trip() + relay
    }
}
