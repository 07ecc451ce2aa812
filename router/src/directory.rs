//! Who hosts what: the live list of peers with their adverts, connections and measured speed, shared by all requests.

mod departed;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use hanse_protocol::{
    Advert, DataConnection, Draining, ExpertRows, HostedExperts, ModelId, Path, PeerId, Precision, Welcome,
};
use tokio::sync::watch;

use crate::plan::Candidate;
use crate::precision::{Forms, Offer};
use crate::stats::{AnsweredCall, Expectation, PeerStats};
use departed::Departed;

/// A peer that failed once is set aside this long; each further failure in a row doubles it.
const FIRST_BACK_OFF: Duration = Duration::from_millis(500);
/// What a way through a relay counts for beyond its round trip: the relay's owner pays for it, and others share it.
const RELAY_PENALTY: Duration = Duration::from_millis(20);
/// The longest time a failing peer is set aside before it is tried again.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);

/// Calls of each peer that an overview looks back on.
const LATEST_CALLS: usize = 256;

/// A client whose last call was sent no longer ago is at work.
const ACTIVE: Duration = Duration::from_secs(2);

/// The experts of a model, as far as a router needs to know them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertLayout {
    /// Length of one row of hidden states.
    pub hidden_size: u32,
    /// Number of experts of each MoE layer, by layer number; dense layers are absent.
    pub layers: BTreeMap<u32, u32>,
}

/// Experts that no peer hosts, by layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing(pub BTreeMap<u32, Vec<u32>>);

impl Missing {
    /// Whether nothing is missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 4;
        for (i, (layer, experts)) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}layer {layer}: {}", ranges(experts))?;
        }
        if self.0.len() > SHOWN {
            write!(f, "; and in {} more layers", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}

/// Ascending numbers as ranges: `0-3,7`.
#[must_use]
pub fn ranges(numbers: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let text: Vec<String> =
        parts.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    text.join(",")
}

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
struct Member {
    advert: Advert,
    link: Option<Link>,
    stats: PeerStats,
    failures_in_a_row: u32,
    /// Set aside until then because it asked for time.
    busy_until: Option<Instant>,
    /// Set aside after a failure, until a probe (not before this time) shows that it answers again.
    probe_at: Option<Instant>,
    /// When its last connection ended, if it had one and has none now.
    lost_at: Option<Instant>,
}

impl Member {
    fn state(&self) -> PeerState {
        match &self.link {
            Some(link) if link.connection.is_closed() => PeerState::Lost,
            Some(_) if self.probe_at.is_some() => PeerState::SetAside,
            Some(_) if self.advert.draining.is_some() => PeerState::Draining,
            Some(_) => PeerState::Connected,
            None if self.lost_at.is_some() => PeerState::Lost,
            None => PeerState::Connecting,
        }
    }

    fn lose(&mut self) {
        if self.link.take().is_some() {
            self.lost_at = Some(Instant::now());
        }
    }

    fn report(&self, peer: PeerId, latest: usize) -> PeerReport {
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
    fn round_trip(&self) -> Duration {
        let Some(link) = &self.link else { return Duration::ZERO };
        let relay = if link.path.is_relayed() { RELAY_PENALTY } else { Duration::ZERO };
        link.connection.round_trip() + relay
    }
}

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

    /// The model of which a peer hosts experts, which may be a variant of the client's, and how it stores them; `None` where only the
    /// client's is accepted.
    pub(crate) fn form_of(&self, peer: &PeerId) -> Option<(ModelId, Precision)> {
        self.forms.as_ref()?;
        self.read().get(peer).map(|member| (member.advert.model, member.advert.precision))
    }

    /// The peers that can be called now for some of `wanted` experts of `layer`, all for the same stored form of each. Peers that were set aside are among
    /// them only with `also_avoided`: they are the last resort.
    pub(crate) fn candidates(
        &self,
        layer: u32,
        wanted: &[ExpertRows],
        except: &[PeerId],
        also_avoided: bool,
        now: Instant,
    ) -> Vec<Candidate> {
        let usable = |peer: &PeerId, member: &Member| {
            let connected = member.link.as_ref().is_some_and(|link| !link.connection.is_closed());
            let avoided = member.probe_at.is_some() || member.busy_until.is_some_and(|until| now < until);
            connected && !except.contains(peer) && (also_avoided || !(avoided || member.advert.draining.is_some()))
        };
        let members = self.read();
        let forms = self.forms_of(&members, layer, wanted);
        let hosts = |member: &Member, (place, want): (usize, &ExpertRows)| {
            let of_the_form = |forms: &Vec<Option<ModelId>>| forms[place] == Some(member.advert.model);
            forms.as_ref().is_none_or(of_the_form) && member.advert.hosted.contains(layer, want.expert)
        };
        members
            .iter()
            .filter(|(peer, member)| usable(peer, member))
            .map(|(&peer, member)| Candidate {
                peer,
                hosts: wanted.iter().enumerate().map(|want| hosts(member, want)).collect(),
                overhead: member.stats.overhead(now, member.round_trip()) + member.stats.failure_cost(now),
                per_assignment: member.stats.per_assignment(),
            })
            .filter(|candidate| candidate.hosts.contains(&true))
            .collect()
    }

    /// For each of `wanted` the model in whose form it is computed, `None` where nobody who is connected hosts it; nothing where only one
    /// form is accepted.
    fn forms_of(
        &self,
        members: &HashMap<PeerId, Member>,
        layer: u32,
        wanted: &[ExpertRows],
    ) -> Option<Vec<Option<ModelId>>> {
        let forms = self.forms.as_ref()?;
        let form = |want: &ExpertRows| {
            let offers: Vec<Offer> = members
                .values()
                .filter(|m| m.link.as_ref().is_some_and(|link| !link.connection.is_closed()))
                .filter(|m| m.advert.hosted.contains(layer, want.expert))
                .map(|m| Offer {
                    model: m.advert.model,
                    precision: m.advert.precision,
                    well: m.probe_at.is_none() && m.advert.draining.is_none(),
                })
                .collect();
            forms.choose(layer, want.expert, &offers)
        };
        Some(wanted.iter().map(form).collect())
    }

    /// How long a call of `assignments` pairs to `peer` should take.
    pub(crate) fn expectation(&self, peer: &PeerId, assignments: usize, now: Instant) -> Expectation {
        let members = self.read();
        // A peer that has left meanwhile is late as a new one would be.
        let Some(member) = members.get(peer) else {
            return PeerStats::default().expectation(now, Duration::ZERO, assignments);
        };
        member.stats.expectation(now, member.round_trip(), assignments)
    }

    /// The most rows in one frame that every connected peer accepts.
    pub(crate) fn max_rows(&self) -> usize {
        let members = self.read();
        let least = members.values().filter_map(|member| member.link.as_ref()).map(|link| link.welcome.max_rows).min();
        least.map_or(1, |rows| rows.max(1) as usize)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_experts_read_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(ranges(&[]), "");
        let missing = Missing((0..6).map(|layer| (layer, vec![1, 2])).collect());
        assert_eq!(missing.to_string(), "layer 0: 1-2; layer 1: 1-2; layer 2: 1-2; layer 3: 1-2; and in 2 more layers");
    }
}
