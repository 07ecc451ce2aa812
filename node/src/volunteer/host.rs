//! What a volunteer hosts over time: the first choice, loading it, and moving capacity to where it is missed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hanse_protocol::{HostedExperts, PeerId};
use hanse_router::weights::FetchError;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::announcer::Announcer;
use super::neighbours::Neighbours;
use super::{Hosting, VolunteerConfig, VolunteerError};
use crate::placement::{self, Move, Step, TARGET_REPLICAS, Turns};

/// How long to wait for the network before choosing experts for a given memory.
pub(super) const LOOK_AROUND: Duration = Duration::from_secs(10);
/// How long a member that joins waits for others who join at the same time.
pub(super) const SETTLE: Duration = Duration::from_secs(1);

/// How long a volunteer that is ready waits for its records to reach other members.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Experts that nobody gave are not tried again for so many looks.
const MISSED_FOR: u32 = 10;

/// How many experts were moved since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moves {
    /// Experts taken after the first choice.
    pub taken: u64,
    /// Experts given up for others.
    pub given: u64,
}

#[derive(Debug, Default)]
pub(super) struct MoveCounts {
    taken: AtomicU64,
    given: AtomicU64,
}

impl MoveCounts {
    pub(super) fn moves(&self) -> Moves {
        Moves { taken: self.taken.load(Ordering::Relaxed), given: self.given.load(Ordering::Relaxed) }
    }
}

/// The task that decides what is hosted.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) announcer: Arc<Announcer>,
    pub(super) neighbours: Neighbours,
    pub(super) moves: Arc<MoveCounts>,
    /// Layers of the model, dense ones included.
    pub(super) layers: u32,
    pub(super) config: VolunteerConfig,
    /// Experts that nobody gave when they were wanted, and since when that is known.
    pub(super) missed: Option<(Instant, HostedExperts)>,
}

impl Host {
    /// Chooses and loads, reports when that is done, and from then on loads what devices that come back held, and rebalances if only a
    /// size of memory was asked for.
    pub(super) async fn run(
        mut self,
        progress: impl Fn(usize, usize) + Send + Sync + 'static,
        report: oneshot::Sender<Result<(), VolunteerError>>,
        cancel: CancellationToken,
    ) {
        let begun = tokio::select! {
            () = cancel.cancelled() => return,
            begun = self.begin(&progress) => begun,
        };
        let begun_well = begun.is_ok();
        // Nobody may wait for it.
        let _ = report.send(begun);
        if begun_well {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = self.go_on() => {}
            }
        }
    }

    async fn begin(&mut self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<(), VolunteerError> {
        let wanted = match &self.config.hosting {
            Hosting::Experts(spec) => spec.resolve(&self.announcer.layout(), self.layers)?,
            Hosting::MemoryBytes(bytes) => self.choose(*bytes).await?,
        };
        let shard = &self.announcer.shard;
        let loaded = shard.load(&wanted, &|done| progress(done, wanted.len())).await;
        match (loaded, &self.config.hosting) {
            // Who chose by itself serves what it could get, and chooses again later.
            (Err(VolunteerError::Fetch(error @ FetchError::NoSource { .. })), Hosting::MemoryBytes(_))
                if !shard.store().is_empty() =>
            {
                tracing::warn!(%error, "hosting {} of {} experts", shard.store().len(), wanted.len());
            }
            (loaded, _) => loaded?,
        }
        self.announcer.announce().await?;
        if self.joins() {
            // Whoever looks after this finds it; a network that does not answer is joined later.
            self.neighbours.wait_published(PUBLISH_TIMEOUT).await;
        }
        Ok(())
    }

    /// Whether there are others to join.
    fn joins(&self) -> bool {
        !self.config.bootstrap.is_empty() || self.config.mdns
    }

    /// Looks, says what it is about to take, looks again in case another one chooses at the same time, and decides.
    async fn choose(&mut self, budget_bytes: u64) -> Result<Vec<(u32, u32)>, VolunteerError> {
        let joins = self.joins();
        // Alone in the network there is nothing to look at, and every expert is equally rare.
        let connected = joins && self.neighbours.wait_connected(LOOK_AROUND).await;
        if joins && !connected {
            tracing::warn!("nobody answered at the bootstrap addresses; choosing experts as the first member");
        }
        if connected {
            self.neighbours.look(SETTLE).await;
        }
        // Who had chosen before this one looked may not see its choice any more.
        let earlier = self.neighbours.loading();
        let first = self.chosen(budget_bytes, &earlier).await?;
        self.announcer.shard.claim(&first)?;
        if !connected {
            return Ok(first);
        }
        self.announcer.announce().await?;
        tokio::time::sleep(SETTLE).await;
        self.neighbours.look(SETTLE).await;
        let second = self.chosen(budget_bytes, &earlier).await?;
        if second != first {
            self.announcer.shard.claim(&second)?;
            self.announcer.announce().await?;
        }
        Ok(second)
    }

    async fn chosen(&self, budget_bytes: u64, earlier: &BTreeSet<PeerId>) -> Result<Vec<(u32, u32)>, VolunteerError> {
        let table = self.announcer.shard.table();
        let budget_bytes = self.announcer.shard.budget(budget_bytes).await?;
        let view = self.neighbours.view_for_choice(table, earlier);
        let at_hand = self.announcer.shard.at_hand()?;
        let chosen = placement::choose(&view, &at_hand, budget_bytes, self.neighbours.seed());
        if chosen.is_empty() {
            return Err(VolunteerError::TooLittleMemory { budget_bytes, expert_bytes: table.smallest() });
        }
        Ok(chosen)
    }

    /// Loads what comes back, and moves capacity, for ever. Nothing moves while calls are refused or a device is lent.
    async fn go_on(&mut self) {
        let started = Instant::now();
        let budget_bytes = match self.config.hosting {
            Hosting::Experts(_) => None,
            Hosting::MemoryBytes(bytes) => Some(bytes),
        };
        let mut turns = Turns::new(self.config.pace, self.neighbours.seed());
        let mut next = turns.next_look(Duration::ZERO);
        loop {
            let shard = self.announcer.shard.clone();
            let budget_bytes = tokio::select! {
                () = shard.came_back() => None,
                () = tokio::time::sleep_until(started + next), if budget_bytes.is_some() => budget_bytes,
            };
            let Some(budget_bytes) = budget_bytes else {
                self.load_missing().await.unwrap_or_else(|error| tracing::warn!(%error, "not all experts came back"));
                continue;
            };
            next = if self.announcer.refuses() || !shard.store().lent().is_empty() {
                turns.next_look(started.elapsed())
            } else {
                self.take_turn(&mut turns, budget_bytes, started).await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "not rebalanced");
                    turns.next_look(started.elapsed())
                })
            };
        }
    }

    /// Loads what was given up with devices that have come back.
    async fn load_missing(&self) -> Result<(), VolunteerError> {
        let shard = &self.announcer.shard;
        let missing = shard.store().take_missing();
        shard.claim(&missing)?;
        let loaded = shard.load(&missing, &|_| ()).await;
        shard.claim(&[])?;
        loaded?;
        self.announcer.announce().await
    }

    /// Looks, moves if it is time to, and says when to look again.
    async fn take_turn(
        &mut self,
        turns: &mut Turns,
        budget_bytes: u64,
        started: Instant,
    ) -> Result<Duration, VolunteerError> {
        let interval = self.config.pace.interval;
        self.neighbours.look(interval).await;
        let own = self.announcer.advert()?;
        let mut view = self.neighbours.view(self.announcer.shard.table(), Some(&own));
        self.missed = self.missed.take().filter(|(since, _)| since.elapsed() < interval * MISSED_FOR);
        if let Some((_, missed)) = &self.missed {
            // As if there were enough of them: others that can be had are taken in their place.
            (0..=TARGET_REPLICAS).for_each(|_| view.add(missed, &[], &HostedExperts::new()));
        }
        let budget_bytes = self.announcer.shard.budget(budget_bytes).await?;
        match turns.step(&view, &own.hosted, budget_bytes, started.elapsed()) {
            Step::LookAt(at) => Ok(at),
            Step::Move(found) => {
                let carried_out = self.carry_out(&found).await;
                if let Err(VolunteerError::Fetch(FetchError::NoSource { .. })) = &carried_out {
                    self.missed = Some((Instant::now(), self.announcer.shard.unobtainable()?));
                }
                carried_out?;
                // Where there was something to gain there often is more.
                Ok(started.elapsed() + interval / 8)
            }
        }
    }

    /// Fetches what comes, gives up what must go once others have heard of it if that still gains, and loads what comes instead.
    async fn carry_out(&mut self, found: &Move) -> Result<(), VolunteerError> {
        let shard = self.announcer.shard.clone();
        let (take, give) = (found.take.len(), found.give.len());
        tracing::info!(take, give, gain = found.gain, loss = found.loss, "moving experts");
        shard.claim(&found.take)?;
        // Everything here is served until what comes instead has been fetched, and nothing goes for what nobody gives.
        let at_hand = shard.fetch(&found.take).await;
        let _at_hand = match at_hand {
            Ok(at_hand) => at_hand,
            Err(error) => {
                shard.claim(&[])?;
                return Err(error);
            }
        };
        if !found.give.is_empty() {
            shard.retire(&found.give)?;
            self.announcer.announce().await?;
            // Clients read adverts anew in this time, and others who would give up the same see that it goes.
            tokio::time::sleep(self.config.pace.spacing).await;
            self.neighbours.refresh().await;
            let others = self.neighbours.view(shard.table(), None);
            if !found.still_gains(&others) {
                tracing::info!("others have moved meanwhile; this move would gain too little now");
                shard.retire(&[])?;
                shard.claim(&[])?;
                return self.announcer.announce().await;
            }
            shard.drop_experts(&found.give).await?;
            self.moves.given.fetch_add(give as u64, Ordering::Relaxed);
        }
        if let Err(error) = shard.load(&found.take, &|_| ()).await {
            shard.claim(&[])?;
            return Err(error);
        }
        self.moves.taken.fetch_add(take as u64, Ordering::Relaxed);
        self.announcer.announce().await
    }
}
