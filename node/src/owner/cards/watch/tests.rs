use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hanse_model::{CardUse, DeviceError, Expert, HeldJob, MoeSpec, Weights};

use super::super::CardProcess;
use super::*;

const MIB: u64 = 1 << 20;
const LIMITS: CardLimits = CardLimits { memory_bytes: 256 * MIB, busy: 0.3, quiet: Duration::from_secs(60) };
const CARD: [u8; 16] = [7; 16];
/// This process, as the host numbers it.
const OWN: u32 = 4242;

/// What a card says, in MiB and percent.
#[derive(Debug, Default)]
struct Dial {
    used: AtomicU64,
    own_busy: AtomicU64,
    others_busy: AtomicU64,
    /// Whether this process is shown.
    shown: AtomicU64,
    silent: AtomicU64,
    /// Whether the card tells who computes.
    tells: AtomicU64,
}

impl Meter for Arc<Dial> {
    fn used_bytes(&self, _card: &[u8; 16]) -> Result<u64, MeterError> {
        match self.silent.load(Relaxed) {
            0 => Ok(self.used.load(Relaxed) * MIB),
            _ => Err(MeterError::Card("silent".into())),
        }
    }
    fn processes(&self, _card: &[u8; 16]) -> Result<Vec<CardProcess>, MeterError> {
        let own = (self.shown.load(Relaxed) > 0).then_some(OWN);
        Ok([Some(1), own].into_iter().flatten().map(|pid| CardProcess { pid, name: None, bytes: None }).collect())
    }
    fn busy(&self, _card: &[u8; 16]) -> Result<Option<Vec<(u32, f64)>>, MeterError> {
        let share = |percent: &AtomicU64| percent.load(Relaxed) as f64 / 100.0;
        let told = vec![(1, share(&self.others_busy)), (OWN, share(&self.own_busy))];
        Ok((self.tells.load(Relaxed) > 0).then_some(told))
    }
    fn busy_in_all(&self, _card: &[u8; 16]) -> Result<Option<f64>, MeterError> {
        Ok(Some(self.others_busy.load(Relaxed) as f64 / 100.0))
    }
}

/// A card that only has so many MiB.
#[derive(Debug)]
struct Holds(AtomicU64);

impl Device for Holds {
    fn name(&self) -> &str {
        "cuda:0"
    }
    fn is_host(&self) -> bool {
        false
    }
    fn card(&self) -> Option<CardUse> {
        Some(CardUse { uuid: CARD, held_bytes: self.0.load(Relaxed) * MIB })
    }
    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(0))
    }
    fn prepare(&self, _hidden_size: usize, _moe: &MoeSpec) -> Result<(), DeviceError> {
        Ok(())
    }
    fn hold(&self, _expert: Expert) -> Result<Weights, DeviceError> {
        Err(DeviceError::NoRoom { device: "cuda:0".into(), wanted_bytes: 0, free_bytes: 0 })
    }
    fn run(&self, _jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A card with a desktop of 400 MiB, opened with a context of 300 and 20 for rows.
fn opened(dial: &Arc<Dial>) -> (CardWatch, Arc<dyn Device>, Arc<Holds>) {
    dial.used.store(400, Relaxed);
    let watch = CardWatch::new(Box::new(dial.clone()), LIMITS, [("cuda:0".to_owned(), CARD)], Instant::now()).unwrap();
    let holds = Arc::new(Holds(20.into()));
    let device: Arc<dyn Device> = holds.clone();
    dial.used.store(400 + 300 + 20, Relaxed);
    dial.shown.store(1, Relaxed);
    watch.opened(&device).unwrap();
    (watch, device, holds)
}

fn taken(watch: &CardWatch, now: Instant) -> Option<Taken> {
    watch.look(now);
    watch.taken(now).get("cuda:0").copied()
}

#[test]
fn what_the_node_itself_takes_and_computes_is_not_others() {
    let dial = Arc::new(Dial { tells: 1.into(), own_busy: 95.into(), ..Dial::default() });
    let (watch, _device, holds) = opened(&dial);
    let now = Instant::now();
    assert_eq!(taken(&watch, now), None);
    holds.0.store(20_000, Relaxed);
    dial.used.store(400 + 300 + 20_000, Relaxed);
    assert_eq!(taken(&watch, now), None);
    dial.others_busy.store(70, Relaxed);
    assert_eq!(taken(&watch, now), Some(Taken::Busy { percent: 70 }));
}

#[test]
fn when_the_device_is_given_up_all_that_is_used_is_others_until_it_is_opened_again() {
    let dial = Arc::new(Dial { tells: 1.into(), ..Dial::default() });
    let (watch, device, holds) = opened(&dial);
    let start = Instant::now();
    dial.used.store(720 + 1000, Relaxed);
    assert_eq!(taken(&watch, start), Some(Taken::Memory { bytes: 1000 * MIB }));
    drop((device, holds));
    dial.shown.store(0, Relaxed);
    dial.used.store(1400, Relaxed);
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(taken(&watch, at(50)).is_some());
    // A desktop of another size is as good, and is what others have from then on.
    dial.used.store(500, Relaxed);
    assert!(taken(&watch, at(60)).is_some());
    assert_eq!(taken(&watch, at(121)), None);
    watch.opening("cuda:0", at(121)).unwrap();
    let device: Arc<dyn Device> = Arc::new(Holds(20.into()));
    dial.used.store(500 + 300 + 20, Relaxed);
    // Nobody looks while it is opened.
    assert_eq!(taken(&watch, at(122)), None);
    watch.opened(&device).unwrap();
    dial.used.store(820 + 250, Relaxed);
    assert_eq!(taken(&watch, at(123)), None);
    dial.used.store(820 + 260, Relaxed);
    assert_eq!(taken(&watch, at(124)), Some(Taken::Memory { bytes: 260 * MIB }));
}

#[test]
fn where_nobody_tells_who_computes_memory_counts_and_a_card_of_others_is_quiet_when_nothing_computes() {
    let dial = Arc::new(Dial::default());
    let (watch, device, holds) = opened(&dial);
    let start = Instant::now();
    dial.others_busy.store(90, Relaxed);
    assert_eq!(taken(&watch, start), None, "that may be this process");
    dial.used.store(720 + 300, Relaxed);
    assert!(taken(&watch, start).is_some());
    drop((device, holds));
    dial.used.store(400, Relaxed);
    let at = |seconds| start + Duration::from_secs(seconds);
    assert!(taken(&watch, at(10)).is_some() && taken(&watch, at(100)).is_some(), "others compute");
    dial.others_busy.store(5, Relaxed);
    assert!(taken(&watch, at(101)).is_some());
    assert_eq!(taken(&watch, at(162)), None);
}

#[test]
fn a_meter_that_is_silent_or_hangs_gives_the_card_away() {
    let dial = Arc::new(Dial::default());
    let (watch, _device, _) = opened(&dial);
    let start = Instant::now();
    assert_eq!(taken(&watch, start), None);
    dial.silent.store(1, Relaxed);
    assert_eq!(taken(&watch, start + UNSEEN_FOR / 2), None);
    assert_eq!(taken(&watch, start + UNSEEN_FOR), Some(Taken::Unseen));
    let (watch, _device, _) = opened(&Arc::new(Dial::default()));
    assert_eq!(taken(&watch, start), None);
    // No look ends any more.
    let card = |seconds| watch.taken(start + Duration::from_secs(seconds)).get("cuda:0").copied();
    assert_eq!((card(5), card(6)), (None, Some(Taken::Unseen)));
}

#[test]
fn this_process_is_the_one_that_came_whatever_its_number() {
    let own = std::process::id();
    let pids = |pids: &[u32]| pids.iter().copied().collect::<BTreeSet<u32>>();
    let before = pids(&[1, 2]);
    assert_eq!(own_pid(&before, &pids(&[1, 2, OWN])), Some(OWN));
    assert_eq!(own_pid(&before, &pids(&[1, 2, OWN, own])), Some(own));
    assert_eq!(own_pid(&before, &pids(&[1, 2, OWN, OWN + 1])), None);
    assert_eq!(own_pid(&before, &pids(&[1])), None, "a container in which nobody is shown");
}
