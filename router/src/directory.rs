//! Who hosts what: the live list of peers with their adverts, connections and measured speed, shared by all requests.

mod choice;
mod departed;
mod layout;
mod member;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use hanse_protocol::{Advert, Draining, HostedExperts, Path, PeerId, Precision};
use tokio::sync::watch;

use crate::precision::Forms;
use crate::stats::{AnsweredCall, PeerStats};
use departed::Departed;
pub use layout::{ExpertLayout, Missing, ranges};
pub(crate) use member::Link;
use member::Member;
pub use member::{PeerReport, PeerState};

/// A peer that failed once is set aside this long; each further failure in a row doubles it.
const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
/// The longest time a failing peer is set aside before it is tried again.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);

/// Calls of each peer that an overview looks back on.
const LATEST_CALLS: usize = 256;

/// A client whose last call was sent no longer ago is at work.
const ACTIVE: Duration = Duration::from_secs(2);

/// The live list of peers of one model. Cheap to read from many requests at once.
#[derive(Debug)]
pub struct Directory {
    layout: ExpertLayout,
    members: RwLock<HashMap<PeerId, Member>>,
    /// When the last call was sent, to whomever.
    last_call: Mutex<Option<Instant>>,
    /// How many look on, and want to be told of a peer that dies although nobody calls it.
    watchers: Arc<AtomicUsize>,
    departed: Departed,
    /// Which stored form of each expert is used; `None` where only the published one is accepted.
    forms: Option<Forms>,
    /// How experts are stored by peers that the client does not accept.
    unwanted: Mutex<BTreeSet<Precision>>,
    changes: watch::Sender<u64>,
}

/// Somebody looks at a directory: as long as this lives, peers are asked whether they are there also while no requests run.
#[derive(Debug)]
pub struct Watching(Arc<AtomicUsize>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Directory {
    pub(crate) fn new(layout: ExpertLayout, forms: Option<Forms>) -> Self {
        Self {
            layout,
            members: RwLock::default(),
            last_call: Mutex::default(),
            watchers: Arc::default(),
            departed: Departed::default(),
            forms,
            unwanted: Mutex::default(),
            changes: watch::channel(0).0,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Member>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Member>> {
        self.members.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|version| *version += 1);
    }

    /// Tells of every change in who can be called.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Has peers that die noticed within seconds for as long as the result lives, whether requests run or not.
    #[must_use]
    pub fn watch(&self) -> Watching {
        self.watchers.fetch_add(1, Ordering::Relaxed);
        Watching(self.watchers.clone())
    }

    /// The model's experts.
    #[must_use]
    pub fn layout(&self) -> &ExpertLayout {
        &self.layout
    }

    /// Notes what a peer says of itself. Its link is dropped if it has moved to other addresses or hosts another variant.
    pub(crate) fn update(&self, peer: PeerId, advert: Advert) {
        let mut members = self.write();
        match members.get_mut(&peer) {
            Some(member) => {
                let differs = member.advert.hosted != advert.hosted || member.advert.draining != advert.draining;
                let moved = |link: &Link| {
                    link.welcome.model != advert.model
                        || matches!(&link.path, Path::Data(at) if !advert.data_addresses.contains(at))
                };
                if member.link.as_ref().is_some_and(moved) {
                    member.lose();
                }
                member.advert = advert;
                if !differs {
                    return;
                }
            }
            None => {
                tracing::info!(%peer, experts = advert.hosted.count(), "peer found");
                members.insert(
                    peer,
                    Member {
                        advert,
                        link: None,
                        stats: PeerStats::default(),
                        failures_in_a_row: 0,
                        busy_until: None,
                        probe_at: None,
                        lost_at: None,
                    },
                );
            }
        }
        drop(members);
        self.changed();
    }

    pub(crate) fn connected(&self, peer: PeerId, link: Link) {
        if let Some(member) = self.write().get_mut(&peer) {
            member.link = Some(link);
            (member.probe_at, member.lost_at) = (None, None);
        }
        self.changed();
    }

    /// The link of `peer` if there is one and it is open.
    pub(crate) fn link(&self, peer: &PeerId) -> Option<Link> {
        self.read().get(peer)?.link.clone().filter(|link| !link.connection.is_closed())
    }

    pub(crate) fn disconnected(&self, peer: &PeerId) {
        if let Some(member) = self.write().get_mut(peer) {
            member.lose();
        }
        self.changed();
    }

    pub(crate) fn remove(&self, peer: &PeerId) {
        let removed = self.write().remove(peer);
        if let Some(mut member) = removed {
            tracing::info!(%peer, "peer left");
            member.lose();
            if let Some(lost_at) = member.lost_at {
                self.departed.add(lost_at, member.report(*peer, LATEST_CALLS));
            }
        }
        self.changed();
    }

    pub(crate) fn sent(&self, peer: &PeerId, now: Instant) {
        *self.last_call.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        if let Some(member) = self.write().get_mut(peer) {
            member.stats.last_sent = Some(now);
        }
    }

    pub(crate) fn answered(&self, peer: &PeerId, now: Instant, call: AnsweredCall) {
        if let Some(member) = self.write().get_mut(peer) {
            member.stats.answered(now, call);
            member.failures_in_a_row = 0;
        }
    }

    /// Sets a peer aside that failed or was too late. The first time it is probed at once, then with a pause that doubles
    /// with every failure, until it answers a call again.
    pub(crate) fn failed(&self, peer: &PeerId, now: Instant) {
        if let Some(member) = self.write().get_mut(peer) {
            member.stats.failed(now);
            let back_off = match member.failures_in_a_row {
                0 => Duration::ZERO,
                failures => FIRST_BACK_OFF * 2u32.pow((failures - 1).min(6)),
            };
            member.failures_in_a_row = member.failures_in_a_row.saturating_add(1);
            member.probe_at.get_or_insert(now + back_off.min(LONGEST_BACK_OFF));
        }
        self.changed();
    }

    /// Whether requests run or somebody looks on, and `peer` might be called but has answered no call for `silent`.
    pub(crate) fn is_owed_a_heartbeat(&self, peer: &PeerId, now: Instant, silent: Duration) -> bool {
        let last_call = *self.last_call.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = |at: Instant| now.saturating_duration_since(at);
        (last_call.is_some_and(|at| elapsed(at) < ACTIVE) || self.watchers.load(Ordering::Relaxed) > 0)
            && self.read().get(peer).is_some_and(|member| {
                member.probe_at.is_none() && member.stats.last_answer.is_none_or(|at| elapsed(at) >= silent)
            })
    }

    /// Completes when the peer is set aside or gone.
    pub(crate) async fn set_aside(&self, peer: &PeerId) {
        let mut changes = self.subscribe();
        loop {
            if self.read().get(peer).is_none_or(|member| member.probe_at.is_some() || member.link.is_none()) {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// When a peer that was set aside may be probed; `None` if it is trusted.
    pub(crate) fn probe_at(&self, peer: &PeerId) -> Option<Instant> {
        self.read().get(peer)?.probe_at
    }

    /// A probe of the peer was answered: it may be called again.
    pub(crate) fn recovered(&self, peer: &PeerId) {
        if let Some(member) = self.write().get_mut(peer) {
            member.probe_at = None;
        }
        self.changed();
    }

    /// Sets a peer aside for as long as it asked to be, without holding it against it.
    pub(crate) fn busy(&self, peer: &PeerId, until: Instant) {
        if let Some(member) = self.write().get_mut(peer) {
            member.busy_until = Some(until);
        }
    }

    /// Notes that a peer refused a call because it is leaving or paused, before its advert was read that says so.
    pub(crate) fn draining(&self, peer: &PeerId) {
        if let Some(member) = self.write().get_mut(peer) {
            member.advert.draining.get_or_insert(Draining::Asked);
        }
        self.changed();
    }

    /// Whether the peer takes no calls at present by its own word.
    pub(crate) fn is_draining(&self, peer: &PeerId) -> bool {
        self.read().get(peer).is_some_and(|member| member.advert.draining.is_some())
    }

    /// Notes a peer that stores experts in fewer bits than the client accepts.
    pub(crate) fn not_wanted(&self, peer: &PeerId, precision: Precision) {
        if self.unwanted.lock().unwrap_or_else(PoisonError::into_inner).insert(precision) {
            tracing::info!(%peer, %precision, "this peer's experts have fewer bits than are accepted");
        }
        if self.write().remove(peer).is_some() {
            self.changed();
        }
    }

    /// How experts are stored by peers that were found and not accepted.
    pub(crate) fn unwanted(&self) -> Vec<Precision> {
        self.unwanted.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// How many peers are known, connected or not.
    pub(crate) fn peers_known(&self) -> usize {
        self.read().len()
    }

    /// The experts that no connected peer hosts.
    #[must_use]
    pub fn missing(&self) -> Missing {
        let members = self.read();
        let hosted: Vec<&HostedExperts> =
            members.values().filter(|m| m.link.is_some()).map(|m| &m.advert.hosted).collect();
        let mut missing = BTreeMap::new();
        for (&layer, &experts) in &self.layout.layers {
            let absent: Vec<u32> =
                (0..experts).filter(|&expert| !hosted.iter().any(|h| h.contains(layer, expert))).collect();
            if !absent.is_empty() {
                missing.insert(layer, absent);
            }
        }
        Missing(missing)
    }

    /// All known peers, ordered by peer id.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerReport> {
        self.reports(usize::MAX)
    }

    /// All known peers and those that were lost within the last minute, ordered by peer id. Made to be asked often: the durations
    /// of calls are those of the latest few hundred.
    #[must_use]
    pub fn overview(&self) -> Vec<PeerReport> {
        let mut reports = self.reports(LATEST_CALLS);
        let known: HashSet<PeerId> = reports.iter().map(|report| report.peer).collect();
        reports.extend(
            self.departed.within_a_minute(Instant::now()).into_iter().filter(|gone| !known.contains(&gone.peer)),
        );
        reports.sort_unstable_by_key(|report| report.peer);
        reports
    }

    fn reports(&self, latest: usize) -> Vec<PeerReport> {
        let members = self.read();
        let mut reports: Vec<PeerReport> = members.iter().map(|(&peer, member)| member.report(peer, latest)).collect();
        reports.sort_unstable_by_key(|report| report.peer);
        reports
    }
}
