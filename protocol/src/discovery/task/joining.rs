//! The members to join through: dialled, looked up again, and what is wrong with them.

use std::time::Duration;

use libp2p::swarm::DialError;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::super::behaviour::IDENTIFY_PREFIX;
use super::super::bootstrap::BootstrapFailure;
use super::super::keys::is_network_name;
use super::super::resolve::resolve_all;
use super::{SwarmTask, root_cause};

/// Host names are looked up again no more often than this.
const RESOLVE_PAUSE: Duration = Duration::from_secs(10);
/// How long that may take.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

impl SwarmTask {
    /// Dials the bootstrap members that are not connected, also where their host names lead by now.
    pub(super) fn dial_bootstrap(&mut self) {
        if self.dial_absent() {
            self.resolve_again();
        }
    }

    /// Dials the bootstrap members that are not connected; whether there are any.
    fn dial_absent(&mut self) -> bool {
        let absent = self.bootstrap.absent(|peer| self.swarm.is_connected(peer));
        let any = !absent.is_empty();
        for (address, peer) in absent {
            if let Some(peer) = peer {
                self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
            }
            if let Err(error) = self.swarm.dial(address.clone()) {
                tracing::debug!(%address, %error, "bootstrap address not dialled");
            }
        }
        any
    }

    /// Looks host names of bootstrap members up again, in the background.
    pub(super) fn resolve_again(&mut self) {
        if self.names.is_empty() || !self.resolving.is_empty() || Instant::now() < self.resolve_at {
            return;
        }
        self.resolve_at = Instant::now() + RESOLVE_PAUSE;
        let names = self.names.clone();
        self.resolving.spawn(async move {
            match tokio::time::timeout(RESOLVE_TIMEOUT, resolve_all(&names)).await {
                Ok(Ok(found)) => found,
                // It has been logged, and the addresses known so far stay.
                Ok(Err(_)) | Err(_) => Vec::new(),
            }
        });
    }

    pub(super) fn on_resolved(&mut self, found: &[Multiaddr]) {
        if !found.is_empty() {
            self.bootstrap.rename(found);
            self.dial_absent();
        }
    }

    /// Notes what is wrong with bootstrap addresses.
    pub(super) fn note_failed_dial(&mut self, error: &DialError) {
        match error {
            DialError::WrongPeerId { obtained: found, address } => {
                if let Some(expected) = self.bootstrap.expected(address) {
                    self.not_joined(address, &BootstrapFailure::WrongPeer { expected, found: *found });
                }
            }
            DialError::Transport(errors) => {
                for (address, error) in errors {
                    self.not_joined(address, &BootstrapFailure::Unanswered(root_cause(error)));
                }
            }
            _ => {}
        }
    }

    /// `peer` has said by its identify's protocol version of which network it is.
    pub(super) fn note_network(&mut self, peer: PeerId, version: &str) {
        if version == self.identify_version {
            self.bootstrap.joined(&peer);
            return;
        }
        let Some(address) = self.dialled.get(&peer).cloned() else { return };
        let network = version.strip_prefix(IDENTIFY_PREFIX).filter(|network| is_network_name(network));
        let other = |network: &str| BootstrapFailure::OtherNetwork(network.to_owned());
        self.not_joined(&address, &network.map_or(BootstrapFailure::NoMember, other));
    }

    fn not_joined(&mut self, address: &Multiaddr, failure: &BootstrapFailure) {
        // A client's user is told when the client gives up.
        if let Some(bootstrap) = self.bootstrap.failed(address, failure)
            && self.serves
        {
            tracing::warn!(%bootstrap, %failure, "not joined, tried again");
        }
    }
}
