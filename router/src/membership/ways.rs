//! The ways to a peer: its data plane, the control plane's connections, and better ones as time goes by.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::future::Either;
use futures::stream::FuturesUnordered;
use hanse_protocol::discovery::Reachability;
use hanse_protocol::{Advert, DataConnection, ModelId, Multiaddr, Path, PeerId};

use super::{HELLO_TIMEOUT, Membership, hello};
use crate::directory::Link;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long each of a peer's addresses is dialled before the next one is too.
const DIAL_STAGGER: Duration = Duration::from_millis(250);
/// How long the direct way is tried alone, where the peer says that there is one, before the control plane's connection is tried beside it.
const HEAD_START: Duration = Duration::from_secs(1);
/// How often a relayed peer is looked at for a hole-punched connection.
const UPGRADE_INTERVAL: Duration = Duration::from_secs(1);
/// Holes that could not be punched are tried again after this; each failure doubles it.
const FIRST_PUNCH_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PUNCH_PAUSE: Duration = Duration::from_secs(600);
/// How often the data-plane addresses of a peer that is reached otherwise are tried again.
const DIRECT_INTERVAL: Duration = Duration::from_secs(30);

/// How a peer may be reached, by its advert.
#[derive(Debug)]
pub(super) struct Ways {
    /// The model of which it hosts experts: the client's, or a variant of it.
    model: ModelId,
    addresses: Vec<SocketAddr>,
    circuits: Vec<Multiaddr>,
    pub(super) reachability: Reachability,
    /// When the data-plane addresses are tried next while there is another link.
    direct_at: tokio::time::Instant,
    punched: tokio::time::Instant,
    punch_pause: Duration,
}

impl Ways {
    pub(super) fn new(model: ModelId) -> Self {
        let now = tokio::time::Instant::now();
        Self {
            model,
            addresses: Vec::new(),
            circuits: Vec::new(),
            reachability: Reachability::Direct,
            direct_at: now,
            punched: now,
            punch_pause: FIRST_PUNCH_PAUSE,
        }
    }

    pub(super) fn is_known(&self) -> bool {
        !(self.addresses.is_empty() && self.circuits.is_empty())
    }

    pub(super) fn learn(&mut self, advert: &Advert) {
        self.model = advert.model;
        self.addresses.clone_from(&advert.data_addresses);
        self.circuits.clone_from(&advert.circuits);
        if self.reachability != advert.reachability && advert.reachability == Reachability::Direct {
            // AutoNAT or its router has just told it.
            self.direct_at = tokio::time::Instant::now();
        }
        self.reachability = advert.reachability;
    }
}

impl Membership {
    /// The first way that leads to the peer: its data-plane addresses, or the control plane, on a relay if need be.
    pub(super) async fn connect(&self, peer: PeerId, ways: &mut Ways) -> Result<Link, String> {
        ways.direct_at = tokio::time::Instant::now() + DIRECT_INTERVAL;
        let head_start = if ways.reachability == Reachability::Direct { HEAD_START } else { Duration::ZERO };
        let direct = std::pin::pin!(self.connect_directly(peer, ways));
        let shared = std::pin::pin!(async {
            tokio::time::sleep(head_start).await;
            self.connect_shared(peer, ways.circuits.clone(), ways.model).await
        });
        match futures::future::select(direct, shared).await {
            Either::Left((Ok(link), _)) | Either::Right((Ok(link), _)) => Ok(link),
            Either::Left((Err(reason), shared)) => shared.await.map_err(|other| format!("{reason}; {other}")),
            Either::Right((Err(reason), direct)) => direct.await.map_err(|other| format!("{other}; {reason}")),
        }
    }

    /// All addresses are dialled, each a moment after the one before: one that swallows packets does not hold up the next, and one that
    /// answers at once keeps the others from being dialled.
    async fn connect_directly(&self, peer: PeerId, ways: &Ways) -> Result<Link, String> {
        let mut dials: FuturesUnordered<_> = (0..)
            .zip(&ways.addresses)
            .map(|(place, &address)| async move {
                tokio::time::sleep(DIAL_STAGGER * place).await;
                let connected = self.endpoint.connect(peer, address, CONNECT_TIMEOUT).await.map_err(|e| e.to_string());
                let greeted = match connected {
                    Ok(connection) => self.greet(connection, ways.model).await,
                    Err(reason) => Err(reason),
                };
                greeted.map_err(|reason| format!("{address}: {reason}"))
            })
            .collect();
        let mut reasons = Vec::new();
        while let Some(dialled) = dials.next().await {
            match dialled {
                Ok(link) => return Ok(link),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    }

    /// The best connection of the control plane, which libp2p dials if there is none.
    async fn connect_shared(&self, peer: PeerId, circuits: Vec<Multiaddr>, model: ModelId) -> Result<Link, String> {
        let connected = self.search.discovery().connect_data(peer, circuits, CONNECT_TIMEOUT).await;
        self.greet(connected.map_err(|e| e.to_string())?, model).await
    }

    async fn greet(&self, connection: DataConnection, model: ModelId) -> Result<Link, String> {
        let welcome = hello(&connection, &self.network, model, HELLO_TIMEOUT).await?;
        Ok(Link { path: connection.path(), connection, welcome })
    }

    /// Completes when a better way than `link` was found.
    pub(super) async fn better_link(&self, peer: PeerId, link: &Link, ways: &mut Ways) -> Link {
        loop {
            if let Path::Data(_) = link.path {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(UPGRADE_INTERVAL).await;
            if link.path.is_relayed()
                && let Ok(shared) = self.connect_shared(peer, Vec::new(), ways.model).await
                && !shared.path.is_relayed()
            {
                return shared;
            }
            if link.path.is_relayed() && ways.punched.elapsed() >= ways.punch_pause {
                ways.punched = tokio::time::Instant::now();
                ways.punch_pause = (ways.punch_pause * 2).min(LONGEST_PUNCH_PAUSE);
                // It fails only where this client ends.
                let _ = self.search.discovery().punch(peer, ways.circuits.clone()).await;
            }
            if tokio::time::Instant::now() >= ways.direct_at {
                ways.direct_at = tokio::time::Instant::now() + DIRECT_INTERVAL;
                if let Ok(direct) = self.connect_directly(peer, ways).await {
                    return direct;
                }
            }
        }
    }
}
