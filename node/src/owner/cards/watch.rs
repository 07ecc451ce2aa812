//! Looks at cards again and again, in a thread of its own: NVML may take its time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hanse_model::Device;
use tokio::sync::watch;

use super::{CardLimits, CardRule, Meter, MeterError, Reading, Taken, UNSEEN_FOR};

/// How often cards are looked at.
const INTERVAL: Duration = Duration::from_millis(250);
/// No driver takes more of a card for a context and the kernels: what is more came with another program.
const MOST_OVERHEAD: u64 = 1 << 30;
/// How often it is measured, and how long after each other.
const OVERHEAD_READINGS: usize = 8;
const OVERHEAD_INTERVAL: Duration = Duration::from_millis(10);

/// Looks at what other programs do on cards.
#[derive(Debug)]
pub struct CardWatch {
    meter: Box<dyn Meter>,
    limits: CardLimits,
    cards: Vec<Watched>,
    /// When all cards had been looked at for the last time.
    looked: Mutex<Instant>,
    taken: watch::Sender<BTreeMap<String, Taken>>,
}

#[derive(Debug)]
struct Watched {
    name: String,
    uuid: [u8; 16],
    /// Never locked while NVML is asked.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rule: CardRule,
    ours: Ours,
}

/// What is known of this process's part in a card.
#[derive(Debug, Clone)]
enum Ours {
    /// The card is being opened, or was never; so it was before.
    Opening(Before),
    /// It was opened. The device may have been given up since: then all that is used is others'.
    Opened {
        device: Weak<dyn Device>,
        /// Bytes that the driver takes for itself as long as the device lives.
        overhead: u64,
        /// How the driver numbers this process, if it shows it.
        pid: Option<u32>,
    },
}

#[derive(Debug, Clone)]
struct Before {
    used: u64,
    pids: BTreeSet<u32>,
}

impl CardWatch {
    /// Looks at cards before any of them is opened. Those that [`Self::opened`] is told of are watched.
    ///
    /// # Errors
    /// A card of which the meter tells nothing.
    pub fn new(
        meter: Box<dyn Meter>,
        limits: CardLimits,
        cards: impl IntoIterator<Item = (String, [u8; 16])>,
        now: Instant,
    ) -> Result<Self, MeterError> {
        let watched = |(name, uuid)| {
            let before = before(&*meter, &uuid)?;
            let rule = CardRule::new(limits, now, before.used);
            Ok(Watched { name, uuid, state: Mutex::new(State { rule, ours: Ours::Opening(before) }) })
        };
        let cards = cards.into_iter().map(watched).collect::<Result<_, MeterError>>()?;
        Ok(Self { meter, limits, cards, looked: Mutex::new(now), taken: watch::Sender::default() })
    }

    fn card(&self, name: &str) -> Option<&Watched> {
        self.cards.iter().find(|card| card.name == name)
    }

    /// A card is about to be opened anew: what is used from here on may be this process's. Asks the meter.
    ///
    /// # Errors
    /// The meter tells nothing of it.
    pub fn opening(&self, name: &str, now: Instant) -> Result<(), MeterError> {
        let Some(card) = self.card(name) else { return Ok(()) };
        let before = before(&*self.meter, &card.uuid)?;
        let rule = CardRule::new(self.limits, now, before.used);
        *card.state() = State { rule, ours: Ours::Opening(before) };
        Ok(())
    }

    /// A card has been opened: it is watched from here on, as long as the device lives and after. Asks the meter.
    ///
    /// # Errors
    /// The meter tells nothing of it.
    pub fn opened(&self, device: &Arc<dyn Device>) -> Result<(), MeterError> {
        let Some(card) = self.card(device.name()) else { return Ok(()) };
        let pids = pids(&*self.meter, &card.uuid)?;
        let Ours::Opening(before) = card.state().ours.clone() else { return Ok(()) };
        let held = || device.card().map_or(0, |card| card.held_bytes);
        let mut overhead = 0;
        for _ in 0..OVERHEAD_READINGS {
            // Experts may be loaded meanwhile, and count from before their memory is taken: no reading is too large, and most are right.
            let (first, used, second) = (held(), self.meter.used_bytes(&card.uuid)?, held());
            overhead = overhead.max(used.saturating_sub(before.used).saturating_sub(first.max(second)));
            std::thread::sleep(OVERHEAD_INTERVAL);
        }
        let overhead = overhead.min(MOST_OVERHEAD);
        let pid = own_pid(&before.pids, &pids);
        tracing::debug!(card = card.name, overhead, ?pid, others = before.used, "watching a card");
        card.state().ours = Ours::Opened { device: Arc::downgrade(device), overhead, pid };
        Ok(())
    }

    /// A card could not be opened again: it is left to others for a while.
    pub fn not_opened(&self, name: &str, now: Instant) {
        let Some(card) = self.card(name) else { return };
        let mut state = card.state();
        state.ours = Ours::Opened { device: Weak::<hanse_model::Cpu>::new(), overhead: 0, pid: None };
        state.rule.stays_away(now);
        self.taken.send_modify(|taken| _ = taken.insert(name.to_owned(), Taken::NotOpened));
    }

    /// Starts the thread that looks, and ends when nobody has this any more.
    ///
    /// # Errors
    /// No thread.
    pub fn start(self: &Arc<Self>) -> Result<watch::Receiver<BTreeMap<String, Taken>>, MeterError> {
        let (watch, news) = (Arc::downgrade(self), self.taken.subscribe());
        let look_on = move || {
            while let Some(watch) = watch.upgrade() {
                watch.look(Instant::now());
                drop(watch);
                std::thread::sleep(INTERVAL);
            }
        };
        std::thread::Builder::new().name("cards".into()).spawn(look_on)?;
        Ok(news)
    }

    /// Looks once.
    fn look(&self, now: Instant) {
        let mut taken = BTreeMap::new();
        for card in &self.cards {
            let ours = card.state().ours.clone();
            let reading = match &ours {
                Ours::Opening(_) => continue,
                Ours::Opened { device, overhead, pid } => self.read(&card.uuid, device, *overhead, *pid),
            };
            let reading = reading.inspect_err(|error| tracing::debug!(card = card.name, %error, "not seen")).ok();
            let mut state = card.state();
            // It may be opened anew meanwhile.
            if let Ours::Opened { .. } = state.ours
                && let Some(why) = state.rule.look(now, reading)
            {
                taken.insert(card.name.clone(), why);
            }
        }
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = now;
        self.taken.send_if_modified(|last| {
            *last != taken && {
                *last = taken;
                true
            }
        });
    }

    fn read(
        &self,
        uuid: &[u8; 16],
        device: &Weak<dyn Device>,
        overhead: u64,
        pid: Option<u32>,
    ) -> Result<Reading, MeterError> {
        let own = || device.upgrade().and_then(|device| device.card()).map_or(0, |card| card.held_bytes + overhead);
        // Memory is counted as ours from before it is taken until after it is free.
        let (first, used, second) = (own(), self.meter.used_bytes(uuid)?, own());
        let others_bytes = used.saturating_sub(first.max(second));
        let is_ours = first.max(second) > 0;
        let sum = |of: Vec<(u32, f64)>| {
            of.iter().filter(|(of, _)| Some(*of) != pid).map(|(_, share)| share).sum::<f64>().min(1.0)
        };
        let others_busy = match (self.meter.busy(uuid)?, is_ours) {
            (Some(_), true) if pid.is_none() => None,
            (Some(of), _) => Some(sum(of)),
            (None, true) => None,
            // Of a card of which we have nothing, all is others'.
            (None, false) => self.meter.busy_in_all(uuid)?,
        };
        Ok(Reading { others_bytes, others_busy })
    }

    /// The cards that are given to others at `now`, and why. Those that could not be looked at for a while are among them.
    pub fn taken(&self, now: Instant) -> BTreeMap<String, Taken> {
        let looked = *self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.taken.borrow().clone();
        if now.saturating_duration_since(looked) > UNSEEN_FOR {
            let unseen = self.cards.iter().filter(|card| matches!(card.state().ours, Ours::Opened { .. }));
            for card in unseen {
                taken.entry(card.name.clone()).or_insert(Taken::Unseen);
            }
        }
        taken
    }
}

impl Watched {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn before(meter: &dyn Meter, uuid: &[u8; 16]) -> Result<Before, MeterError> {
    Ok(Before { used: meter.used_bytes(uuid)?, pids: pids(meter, uuid)? })
}

fn pids(meter: &dyn Meter, uuid: &[u8; 16]) -> Result<BTreeSet<u32>, MeterError> {
    Ok(meter.processes(uuid)?.into_iter().map(|process| process.pid).collect())
}

/// How the driver numbers this process: in a container that may be the host's number. It is the one that came with the card's opening.
fn own_pid(before: &BTreeSet<u32>, after: &BTreeSet<u32>) -> Option<u32> {
    let mut came = after.difference(before).copied();
    match (came.next(), came.next()) {
        (first, None) => first,
        _ => after.difference(before).copied().find(|pid| *pid == std::process::id()),
    }
}

#[cfg(test)]
mod tests;
