//! Breaks volunteers, one after the other, and mends them.

use std::time::{Duration, Instant};

use hanse_router::{Client, PeerReport};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::ChaosConfig;
use super::trouble::{Hosts, Kind, Schedule, Tally, Trouble};
use crate::testnet::{Testnet, TestnetError};

/// How often the state of things is looked at.
const TICK: Duration = Duration::from_millis(50);
/// A volunteer that has been connected for so long after its return is well even if nobody called it.
const SETTLED: Duration = Duration::from_secs(3);
/// A slowed volunteer gets one part in so many of the time.
const SLOWER: u32 = 10;

/// What was done and seen.
#[derive(Debug, Default)]
pub(super) struct Noted {
    pub(super) tally: Tally,
    pub(super) begun: Vec<(Instant, usize, Kind)>,
    pub(super) longest_in_routes: Duration,
    pub(super) returns: Vec<Duration>,
}

/// How a volunteer is, as far as the one who breaks things knows.
#[derive(Debug, Clone, Copy)]
enum Health {
    Well,
    Ill(Trouble),
    /// Its trouble is over, but the client has not had an answer since.
    Returning {
        since: Instant,
        calls: u64,
    },
}

pub(super) struct Breaker {
    pub(super) net: Testnet,
    client: Client,
    hosts: Hosts,
    schedule: Schedule,
    health: Vec<Health>,
    /// The one that crawls.
    slowed: Option<usize>,
    pub(super) noted: Noted,
    pub(super) experts: Vec<usize>,
}

impl Breaker {
    pub(super) fn new(net: Testnet, client: Client, hosts: Hosts, config: &ChaosConfig) -> Self {
        let schedule = Schedule::new(StdRng::seed_from_u64(config.seed), config.pause);
        let experts = net.nodes().iter().map(crate::testnet::Node::experts).collect();
        let health = vec![Health::Well; config.nodes];
        let (slowed, noted) = (None, Noted::default());
        Self { net, client, hosts, schedule, health, slowed, noted, experts }
    }

    pub(super) async fn break_things(&mut self, duration: Duration, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let began = Instant::now();
        let mut next = began;
        while began.elapsed() < duration {
            for index in 0..self.health.len() {
                self.look_after(index, say).await?;
            }
            let slow_is_due = self.slowed.is_none() && began.elapsed() > duration / 2;
            if slow_is_due {
                // From the middle on one volunteer crawls; nobody else is disturbed until one may.
                self.slow_one(say).await?;
            } else if Instant::now() >= next {
                // If nobody may be disturbed now, somebody may be a moment later.
                let disturbed = self.disturb(say).await?;
                next = Instant::now() + if disturbed { self.schedule.pause() } else { TICK };
            }
            tokio::time::sleep(TICK).await;
        }
        for index in 0..self.health.len() {
            if let Health::Ill(trouble) = self.health[index] {
                self.end(index, trouble, say).await?;
            }
        }
        Ok(())
    }

    /// What the client knows of a volunteer; nothing if it has forgotten it.
    fn report(&self, index: usize) -> Option<PeerReport> {
        let peer = self.net.nodes().get(index)?.peer_id();
        self.client.peers().into_iter().find(|report| report.peer == peer)
    }

    /// Calls that a volunteer has answered so far.
    fn calls(&self, index: usize) -> u64 {
        self.report(index).map_or(0, |report| report.stats.calls)
    }

    async fn look_after(&mut self, index: usize, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        match self.health[index] {
            Health::Well => {}
            Health::Ill(trouble) => {
                if trouble.kind.is_silent()
                    && let Some(sent) = self.report(index).and_then(|report| report.stats.last_sent)
                {
                    let after = sent.saturating_duration_since(trouble.since);
                    self.noted.longest_in_routes = self.noted.longest_in_routes.max(after);
                }
                if Instant::now() >= trouble.until {
                    self.end(index, trouble, say).await?;
                }
            }
            Health::Returning { since, calls } => {
                let Some(report) = self.report(index) else { return Ok(()) };
                // A client that had forgotten it counts from nothing again.
                let called = report.stats.calls > 0
                    && report.stats.calls != calls
                    && report.stats.last_sent.is_some_and(|sent| sent > since);
                if called {
                    self.noted.returns.push(since.elapsed());
                }
                // One that is not needed may be connected and not be called.
                if called || (report.address.is_some() && since.elapsed() > SETTLED) {
                    self.health[index] = Health::Well;
                }
            }
        }
        Ok(())
    }

    /// Whether a volunteer may be taken away now: whatever it hosts must have another host that is well and quick.
    fn is_dispensable(&self, index: usize) -> bool {
        let usable = |other: usize| {
            other != index && Some(other) != self.slowed && matches!(self.health.get(other), Some(Health::Well))
        };
        matches!(self.health.get(index), Some(Health::Well)) && self.hosts.covered_by(usable)
    }

    async fn disturb(&mut self, say: &impl Fn(&str)) -> Result<bool, TestnetError> {
        let able: Vec<usize> =
            (0..self.health.len()).filter(|&i| Some(i) != self.slowed && self.is_dispensable(i)).collect();
        let Some(index) = self.schedule.pick(&able) else { return Ok(false) };
        let (kind, lasts) = self.schedule.trouble();
        say(&format!("volunteer {index}: {kind}"));
        let since = Instant::now();
        match kind {
            Kind::Kill | Kind::Restart => self.net.kill(index).await?,
            Kind::Hang => self.net.pause(index).await?,
            Kind::Deaf => self.net.cut(index, true, false)?,
            Kind::Mute => self.net.cut(index, false, true)?,
            Kind::Leave => self.net.leave(index).await?,
            Kind::Rest => self.net.rest(index).await?,
        }
        self.noted.tally.count(kind);
        self.noted.begun.push((since, index, kind));
        self.health[index] = Health::Ill(Trouble { kind, since, until: since + lasts });
        Ok(true)
    }

    async fn end(&mut self, index: usize, trouble: Trouble, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let calls = self.calls(index);
        match trouble.kind {
            Kind::Kill | Kind::Restart | Kind::Leave => self.net.restart(index).await?,
            Kind::Rest => self.net.wake(index).await?,
            Kind::Hang => self.net.resume(index).await?,
            Kind::Deaf | Kind::Mute => self.net.cut(index, false, false)?,
        }
        say(&format!("volunteer {index}: back"));
        self.health[index] = Health::Returning { since: Instant::now(), calls };
        Ok(())
    }

    async fn slow_one(&mut self, say: &impl Fn(&str)) -> Result<(), TestnetError> {
        let able: Vec<usize> = (0..self.health.len()).filter(|&i| self.is_dispensable(i)).collect();
        let Some(index) = self.schedule.pick(&able) else { return Ok(()) };
        say(&format!("volunteer {index}: {SLOWER} times slower from now on"));
        self.net.slow(index, SLOWER).await?;
        self.noted.tally.slowed += 1;
        self.slowed = Some(index);
        Ok(())
    }
}
