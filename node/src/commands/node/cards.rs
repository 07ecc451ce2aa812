//! `--yield-to-others`: a card that another program takes is given back, and taken again when that program has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_model::{DeviceChoice, OpenError, card_uuids};
use hanse_node::owner::cards::{MeterError, meter};
use hanse_node::owner::{CardLimits, CardWatch, Taken};
use hanse_node::{Volunteer, VolunteerError};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use crate::cli::NodeArgs;

/// A pass that is being computed is waited for so long, so that the card's memory is free two seconds after it was taken.
const WITHIN: Duration = Duration::from_millis(1200);

/// Cards that others may take.
#[derive(Debug)]
pub(super) struct Cards {
    watch: Arc<CardWatch>,
    news: watch::Receiver<BTreeMap<String, Taken>>,
    /// Those to be given up next, and why.
    wanted: BTreeMap<String, Taken>,
    /// Those that were given up, and why.
    lent: BTreeMap<String, Taken>,
    opening: BTreeSet<String>,
    openings: JoinSet<(String, Result<(), NotOpened>)>,
}

#[derive(Debug, thiserror::Error)]
enum NotOpened {
    #[error(transparent)]
    Meter(#[from] MeterError),
    #[error(transparent)]
    Volunteer(#[from] VolunteerError),
}

/// Looks at the cards before the node has anything of them; `None` where others are not to have them.
pub(super) async fn before(args: &NodeArgs) -> anyhow::Result<Option<Arc<CardWatch>>> {
    let limits = &args.limits;
    if !limits.yield_to_others {
        return Ok(None);
    }
    anyhow::ensure!(
        args.device != DeviceChoice::Cpu,
        "--yield-to-others gives cards back, and with --device cpu none is used: --yield-above is for the processor"
    );
    let limits = CardLimits {
        memory_bytes: limits.yield_memory.as_u64(),
        busy: f64::from(limits.yield_busy) / 100.0,
        quiet: Duration::from_secs(limits.yield_quiet),
    };
    let look = move || {
        let cards = card_uuids()?;
        if cards.is_empty() {
            return Err(OpenError::NoSuchCard { card: 0, cards: 0 }.into());
        }
        let named = (0..).zip(cards).map(|(number, uuid): (u32, _)| (format!("cuda:{number}"), uuid));
        CardWatch::new(meter()?, limits, named, Instant::now())
    };
    let watch = tokio::task::spawn_blocking(look).await?.context("--yield-to-others cannot be done here")?;
    Ok(Some(Arc::new(watch)))
}

impl Cards {
    /// Begins to watch the cards that a volunteer uses.
    pub(super) async fn watch(watch: Arc<CardWatch>, volunteer: &Volunteer) -> anyhow::Result<Self> {
        let devices = volunteer.store().devices();
        anyhow::ensure!(
            !devices.iter().all(|device| device.is_host()),
            "--yield-to-others gives cards back, and none can be used (see above): --yield-above is for the processor"
        );
        let begin = move || {
            devices.iter().try_for_each(|device| watch.opened(device))?;
            let news = watch.start()?;
            Ok::<_, MeterError>((watch, news))
        };
        let (watch, news) = tokio::task::spawn_blocking(begin).await??;
        let (wanted, lent, opening, openings) = Default::default();
        Ok(Self { watch, news, wanted, lent, opening, openings })
    }

    /// Completes when there is something to [`Self::follow`].
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.news.changed() => {}
            Some(opened) = self.openings.join_next() => self.opened(opened),
            else => std::future::pending().await,
        }
    }

    /// Looks at what others want. Returns why the last card goes or has gone, if none stays.
    pub(super) fn look(&mut self, volunteer: &Volunteer) -> Option<Taken> {
        let taken = self.watch.taken(Instant::now());
        let devices = volunteer.store().devices();
        let is_used = |name: &String| devices.iter().any(|device| device.name() == name);
        let back: Vec<String> = self.lent.keys().filter(|name| is_used(name)).cloned().collect();
        back.iter().for_each(|name| _ = self.lent.remove(name));
        self.wanted = taken.into_iter().filter(|(name, _)| is_used(name)).collect();
        let none_stays = devices.iter().all(|device| self.wanted.contains_key(device.name()));
        let first = self.lent.iter().chain(&self.wanted).min_by_key(|(name, _)| *name);
        first.map(|(_, why)| *why).filter(|_| none_stays)
    }

    /// Gives up what others want, and begins to open what they have left.
    pub(super) async fn follow(&mut self, volunteer: &Volunteer) -> Result<(), VolunteerError> {
        let wanted = std::mem::take(&mut self.wanted);
        let lending = wanted.keys().map(|device| volunteer.lend(device, WITHIN));
        let lent = futures::future::try_join_all(lending).await?;
        for ((device, why), lent) in wanted.into_iter().zip(lent) {
            let Some(lent) = lent else { continue };
            let (experts, took) = (lent.experts, lent.took);
            tracing::info!(device, experts, ?took, %why, "a card is given back");
            if !lent.freed {
                tracing::warn!(
                    device,
                    "a pass is computed for longer than others are to wait; then the card's memory is free"
                );
            }
            self.lent.insert(device, why);
        }
        let taken = self.watch.taken(Instant::now());
        for device in self.lent.keys().filter(|device| !taken.contains_key(*device)) {
            if !self.opening.insert(device.clone()) {
                continue;
            }
            let (watch, device, open) = (self.watch.clone(), device.clone(), volunteer.taking_back(device));
            self.openings.spawn_blocking(move || {
                let opened = || Ok(watch.opening(&device, Instant::now())?).and_then(|()| Ok(watch.opened(&open()?)?));
                let opened = opened().inspect_err(|_| watch.not_opened(&device, Instant::now()));
                (device, opened)
            });
        }
        Ok(())
    }

    fn opened(&mut self, opened: Result<(String, Result<(), NotOpened>), JoinError>) {
        match opened {
            Ok((device, outcome)) => {
                self.opening.remove(&device);
                match outcome {
                    Ok(()) => tracing::info!(device, "others have left the card: its experts are loaded again"),
                    Err(error) => tracing::warn!(device, %error, "the card is not used again yet"),
                }
            }
            // It would not open another time either.
            Err(error) => tracing::error!(%error, "opening a card"),
        }
    }

    /// What is to be said of cards that are given up while others serve.
    pub(super) fn text(&self) -> String {
        self.lent.iter().map(|(device, why)| format!(", without {device}: {why}")).collect()
    }
}
