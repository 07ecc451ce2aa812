//! A client of a network of swarms.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hanse_protocol::PeerId;
use hanse_protocol::discovery::{Discovery, Traffic};
use hanse_router::search::{EAGER_INTERVAL, PeerSearch};
use serde::Serialize;
use tokio::sync::mpsc;

use super::super::member::MODEL;
use super::PATIENCE;
use crate::placement::{ExpertTable, View};

/// How many found peers may wait, as in a real client.
const ARRIVAL_QUEUE: usize = 64;

/// How a client came to know a network. Seconds are counted from its start; `None` means not within the time it had.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Found {
    /// Members of the network.
    pub members: usize,
    /// Seconds until the first advert was read.
    pub first: Option<f64>,
    /// Seconds until every expert was in some advert that was read.
    pub covered: Option<f64>,
    /// Seconds until every member's advert was read.
    pub all: Option<f64>,
    /// Look-ups of all keys by then.
    pub look_ups: u64,
    /// Adverts that could not be read at the first attempt.
    pub failed_reads: usize,
    /// Bytes that the client had sent and received when every expert was covered.
    pub bytes_covered: u64,
    /// The same when every advert was read, or at the end.
    pub bytes_all: u64,
    /// Connections made by then.
    pub connections: u64,
    /// Bytes of one more look-up of all keys.
    pub look_up_bytes: u64,
    /// Bytes of reading all adverts once more.
    pub adverts_bytes: u64,
}

/// A client that has started.
#[derive(Debug)]
pub struct SwarmClient {
    search: PeerSearch,
    traffic: Arc<Traffic>,
    view: View,
    started: Instant,
    known: HashSet<PeerId>,
    found: Found,
}

impl SwarmClient {
    pub(super) fn new(discovery: Discovery, traffic: Arc<Traffic>, table: Arc<ExpertTable>, members: usize) -> Self {
        let layers: Vec<u32> = table.layer_numbers().collect();
        Self {
            search: PeerSearch::new(discovery, MODEL, layers),
            traffic,
            view: View::new(table),
            started: Instant::now(),
            known: HashSet::new(),
            found: Found { members, ..Found::default() },
        }
    }

    fn bytes(&self) -> u64 {
        self.traffic.sent() + self.traffic.received()
    }

    /// Searches as a client does while experts are missing, until every member's advert was read, at most for `patience`; then looks
    /// once more to see what that costs, and leaves.
    pub async fn discover(mut self, patience: Duration) -> Found {
        // Running out of time is told by what was not found.
        let _ = tokio::time::timeout(patience, self.search_all()).await;
        self.found.bytes_all = self.bytes();
        self.found.connections = self.traffic.connections();
        self.found.look_up_bytes = self.cost_of_look_up().await;
        let before = self.bytes();
        let reads = self.known.iter().map(|peer| self.search.advert(*peer));
        futures::future::join_all(reads).await;
        self.found.adverts_bytes = self.bytes() - before;
        self.search.discovery().shutdown().await;
        self.found
    }

    async fn search_all(&mut self) {
        let look_ups = std::sync::atomic::AtomicU64::new(1);
        let (sender, mut arrivals) = mpsc::channel(ARRIVAL_QUEUE);
        let searcher = self.search.clone();
        if searcher.discovery().wait_connected(PATIENCE).await.is_err() {
            return;
        }
        let search = searcher.run(sender, || {
            look_ups.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            EAGER_INTERVAL
        });
        tokio::pin!(search);
        let mut named = HashSet::new();
        let mut reads = FuturesUnordered::new();
        while self.known.len() < self.found.members {
            tokio::select! {
                () = &mut search => return,
                Some(peer) = arrivals.recv() => {
                    if named.insert(peer) {
                        reads.push(read(&searcher, peer));
                    }
                }
                Some((peer, read)) = reads.next() => match read {
                    Some(advert) => {
                        self.known.insert(peer);
                        self.view.add(&advert.hosted, &advert.popularity, &advert.loading);
                        self.note();
                    }
                    None => {
                        self.found.failed_reads += 1;
                        named.remove(&peer);
                    }
                },
            }
            self.found.look_ups = look_ups.load(std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// What has been reached.
    fn note(&mut self) {
        let now = self.started.elapsed().as_secs_f64();
        self.found.first.get_or_insert(now);
        if self.found.covered.is_none() && self.view.all_replicas().iter().all(|replicas| *replicas > 0) {
            self.found.covered = Some(now);
            self.found.bytes_covered = self.bytes();
        }
        if self.known.len() == self.found.members {
            self.found.all = Some(now);
        }
    }

    async fn cost_of_look_up(&self) -> u64 {
        let before = self.bytes();
        let (sender, mut arrivals) = mpsc::channel(ARRIVAL_QUEUE);
        let heard = async { while arrivals.recv().await.is_some() {} };
        let look_up = async {
            self.search.look_up(&sender).await;
            drop(sender);
        };
        futures::future::join(look_up, heard).await;
        self.bytes() - before
    }
}

async fn read(search: &PeerSearch, peer: PeerId) -> (PeerId, Option<hanse_protocol::Advert>) {
    (peer, search.advert(peer).await.ok().flatten())
}
