//! The virtual clock and what happens by it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_protocol::popularity;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::member::{Member, Said, set};
use super::report::Measures;
use super::{Report, Scenario};
use crate::placement::{ExpertTable, Move, Step, View, choose};

/// Adverts are read by others about this often.
const READ_INTERVAL: Duration = Duration::from_secs(30);
/// A member that crashed is counted by others until its advert expires.
const ADVERT_LIFETIME: Duration = Duration::from_secs(120);
/// Experts that are served as soon as they are loaded together.
const LOADED_TOGETHER: usize = 16;
/// Replicas are sampled this often.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, PartialEq)]
enum Event {
    Join(usize),
    Leave(usize, u64),
    /// Others do not count the member any more.
    Forget(usize, u64),
    Look(usize, u64),
    Loaded(usize, u64, Vec<(u32, u32)>),
    Given(usize, u64, Move),
    Read,
    Sample,
}

/// A simulated network.
#[derive(Debug)]
pub struct World {
    pub(super) scenario: Scenario,
    pub(super) table: Arc<ExpertTable>,
    pub(super) members: Vec<Member>,
    /// Rows a minute that all clients together want of each expert.
    demand: BTreeMap<(u32, u32), f64>,
    /// All adverts as they are, and as they were read last.
    pub(super) said: View,
    seen: View,
    /// Peers that really host an expert.
    pub(super) alive: BTreeMap<(u32, u32), u32>,
    now: Duration,
    events: BTreeMap<u64, Event>,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    next_event: u64,
    random: StdRng,
    churn: bool,
    pub(super) measures: Measures,
}

impl World {
    /// All members are about to begin: half of them within the first minutes.
    #[must_use]
    pub fn new(scenario: Scenario) -> Self {
        let mut random = StdRng::seed_from_u64(scenario.seed);
        let layers = (0..scenario.layers).map(|layer| (layer, (scenario.experts, scenario.expert_bytes))).collect();
        let table = Arc::new(ExpertTable::new(&layers));
        let members: Vec<Member> = (0..scenario.members).map(|_| Member::new(&scenario, &mut random)).collect();
        let experts = (0..scenario.layers).flat_map(|layer| (0..scenario.experts).map(move |expert| (layer, expert)));
        let alive: BTreeMap<(u32, u32), u32> = experts.map(|pair| (pair, 0)).collect();
        let mut world = Self {
            table: table.clone(),
            members,
            demand: BTreeMap::new(),
            said: View::new(table.clone()),
            seen: View::new(table),
            measures: Measures::new(alive.len()),
            alive,
            now: Duration::ZERO,
            events: BTreeMap::new(),
            queue: BinaryHeap::new(),
            next_event: 0,
            random,
            churn: true,
            scenario,
        };
        world.shift_demand();
        for member in 0..world.members.len() {
            let availability = world.members[member].availability;
            let online_first = world.random.random_bool(availability);
            let wait = if online_first { world.random.random_range(0.0..600.0) } else { world.offline_seconds(member) };
            world.after(Duration::from_secs_f64(wait), Event::Join(member));
        }
        world.after(READ_INTERVAL, Event::Read);
        world.after(SAMPLE_INTERVAL, Event::Sample);
        world
    }

    /// Draws anew which experts are wanted: few very much, most about as much as the average.
    pub fn shift_demand(&mut self) {
        let random = &mut self.random;
        let demand = self.alive.keys().map(|pair| {
            // The sum of twelve uniform numbers is about normal; e to its power is about log-normal.
            let normal: f64 = (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
            (*pair, 200.0 * (0.7 * normal).exp())
        });
        self.demand = demand.collect();
    }

    /// From now on nobody joins or leaves any more.
    pub fn end_churn(&mut self) {
        self.churn = false;
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(&Reverse((at, id))) = self.queue.peek() {
            if at > end {
                break;
            }
            self.queue.pop();
            self.measures.pass(at - self.now, self.members.iter().filter(|member| member.online).count());
            self.now = at;
            if let Some(event) = self.events.remove(&id) {
                self.happen(event);
            }
        }
        self.measures.pass(end - self.now, self.members.iter().filter(|member| member.online).count());
        self.now = end;
    }

    /// What was measured so far.
    #[must_use]
    pub fn report(&self) -> Report {
        Report::of(self)
    }

    /// Forgets what was measured: the beginning of a network says little about it.
    pub fn measure_from_now(&mut self) {
        let mut measures = Measures::new(self.alive.len());
        measures.uncovered = self.alive.values().filter(|replicas| **replicas == 0).count();
        measures.in_danger = self.alive.values().filter(|replicas| **replicas < 2).count();
        self.measures = measures;
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.queue.push(Reverse((self.now + wait, self.next_event)));
        self.events.insert(self.next_event, event);
        self.next_event += 1;
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.random.random_range(f64::EPSILON..1.0).ln()
    }

    fn mean_session(&self) -> f64 {
        self.scenario.median_session.as_secs_f64() / std::f64::consts::LN_2
    }

    fn offline_seconds(&mut self, member: usize) -> f64 {
        let availability = self.members[member].availability;
        let mean = self.mean_session() * (1.0 - availability) / availability;
        self.exponential(mean)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Join(member) if self.churn => self.join(member),
            Event::Join(_) => {}
            Event::Leave(member, session) if self.churn && self.is_on(member, session) => self.leave(member),
            Event::Leave(..) => {}
            Event::Forget(member, session) => {
                if self.members[member].session == session && !self.members[member].online {
                    self.say_nothing(member);
                }
            }
            Event::Look(member, session) if self.is_on(member, session) => self.look(member),
            Event::Loaded(member, session, experts) if self.is_on(member, session) => self.loaded(member, &experts),
            Event::Given(member, session, found) if self.is_on(member, session) => self.give(member, &found),
            Event::Look(..) | Event::Loaded(..) | Event::Given(..) => {}
            Event::Read => {
                self.seen = self.said.clone();
                for member in &mut self.members {
                    member.seen = member.said.clone();
                }
                self.after(READ_INTERVAL, Event::Read);
            }
            Event::Sample => {
                self.measures.sample(self.alive.values().copied());
                self.after(SAMPLE_INTERVAL, Event::Sample);
            }
        }
    }

    fn is_on(&self, member: usize, session: u64) -> bool {
        self.members[member].online && self.members[member].session == session
    }

    fn join(&mut self, at: usize) {
        self.say_nothing(at);
        let view = self.view_of(at, false);
        let member = &mut self.members[at];
        member.online = true;
        member.session += 1;
        let session = member.session;
        let started = Instant::now();
        let chosen = choose(&view, &set(&member.cache), member.memory, member.seed);
        self.measures.planned(started.elapsed());
        member.loading = chosen.iter().copied().collect();
        let (mut wait, first_look) = (Duration::ZERO, member.turns.next_look(Duration::ZERO));
        let mut arrivals = Vec::new();
        for experts in chosen.chunks(LOADED_TOGETHER) {
            let (time, fetched) = member.load_time(experts, self.scenario.expert_bytes);
            wait += time;
            self.measures.fetched += fetched;
            arrivals.push((wait, experts.to_vec()));
        }
        for (at_time, experts) in arrivals {
            self.after(at_time, Event::Loaded(at, session, experts));
        }
        self.say(at);
        let mean = self.mean_session();
        let length = self.exponential(mean);
        self.after(Duration::from_secs_f64(length), Event::Leave(at, session));
        // Rebalancing begins when everything is loaded.
        self.after(wait + first_look, Event::Look(at, session));
    }

    fn leave(&mut self, at: usize) {
        let hosted = std::mem::take(&mut self.members[at].hosted);
        for pair in &hosted {
            self.count(*pair, -1);
        }
        let member = &mut self.members[at];
        member.cache = hosted;
        member.online = false;
        (member.loading, member.retiring) = (BTreeSet::new(), BTreeSet::new());
        let session = member.session;
        if self.random.random_bool(self.scenario.crashes) {
            let age = self.random.random_range(0.5..1.0);
            self.after(ADVERT_LIFETIME.mul_f64(age), Event::Forget(at, session));
        } else {
            self.say_nothing(at);
        }
        let wait = self.offline_seconds(at);
        self.after(Duration::from_secs_f64(wait), Event::Join(at));
    }

    fn look(&mut self, at: usize) {
        let session = self.members[at].session;
        self.say(at);
        let view = self.view_of(at, true);
        let member = &mut self.members[at];
        let own = member.said.clone().unwrap_or_default();
        let started = Instant::now();
        let step = member.turns.step(&view, &own.hosted, member.memory, self.now);
        self.measures.planned(started.elapsed());
        match step {
            Step::LookAt(time) => self.after(time.saturating_sub(self.now), Event::Look(at, session)),
            Step::Move(found) => {
                member.loading = found.take.iter().copied().collect();
                member.retiring = found.give.iter().copied().collect();
                self.say(at);
                let wait = if found.give.is_empty() { Duration::ZERO } else { self.scenario.pace.spacing };
                self.after(wait, Event::Given(at, session, found));
            }
        }
    }

    /// What was to be given up goes if that still gains, and what comes instead is fetched.
    fn give(&mut self, at: usize, found: &Move) {
        let session = self.members[at].session;
        let next = self.scenario.pace.interval / 8;
        let mut others = self.said.clone();
        if let Some(own) = &self.members[at].said {
            own.remove_from(&mut others);
        }
        if !found.give.is_empty() && !found.still_gains(&others) {
            let member = &mut self.members[at];
            (member.loading, member.retiring) = (BTreeSet::new(), BTreeSet::new());
            self.measures.called_off += 1;
            self.say(at);
            self.after(next, Event::Look(at, session));
            return;
        }
        for pair in &found.give {
            if self.members[at].hosted.remove(pair) {
                self.count(*pair, -1);
            }
        }
        let member = &mut self.members[at];
        member.retiring = BTreeSet::new();
        let (time, fetched) = member.load_time(&found.take, self.scenario.expert_bytes);
        self.measures.moves += 1;
        self.measures.moved_experts += found.take.len() as u64;
        self.measures.fetched += fetched;
        self.after(time, Event::Loaded(at, session, found.take.clone()));
        self.after(time + next, Event::Look(at, session));
    }

    fn loaded(&mut self, at: usize, experts: &[(u32, u32)]) {
        for pair in experts {
            self.members[at].loading.remove(pair);
            if self.members[at].hosted.insert(*pair) {
                self.count(*pair, 1);
            }
        }
        self.say(at);
    }

    /// The network as a member sees it, with or without its own advert of now.
    fn view_of(&self, at: usize, with_own: bool) -> View {
        let mut view = self.seen.clone();
        if let Some(seen) = &self.members[at].seen {
            seen.remove_from(&mut view);
        }
        if let Some(own) = self.members[at].said.as_ref().filter(|_| with_own) {
            own.add_to(&mut view);
        }
        view
    }

    /// Makes a member's advert.
    fn say(&mut self, at: usize) {
        self.say_nothing(at);
        let member = &self.members[at];
        let hosted = set(member.hosted.difference(&member.retiring));
        let rate = |pair: &(u32, u32)| {
            let replicas = self.alive.get(pair).copied().unwrap_or(1).max(1);
            self.demand.get(pair).copied().unwrap_or(0.0) / f64::from(replicas)
        };
        let steps = hosted.iter().map(|pair| popularity(rate(&pair))).collect();
        let said = Said { hosted, popularity: steps, loading: set(&member.loading) };
        said.add_to(&mut self.said);
        self.members[at].said = Some(Arc::new(said));
    }

    fn say_nothing(&mut self, at: usize) {
        if let Some(said) = self.members[at].said.take() {
            said.remove_from(&mut self.said);
        }
    }

    /// One replica more or less.
    fn count(&mut self, pair: (u32, u32), by: i32) {
        let Some(replicas) = self.alive.get_mut(&pair) else { return };
        let before = *replicas;
        *replicas = replicas.saturating_add_signed(by);
        self.measures.changed(before, *replicas);
    }
}
