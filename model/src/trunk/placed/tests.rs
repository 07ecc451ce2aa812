//! A trunk on a card that computes in this process, and fails or fills up when it is told to. What a driver does is in
//! `tests/trunk_on_device.rs`.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::checkpoint::{Checkpoint, Swiglu};
use crate::device::{Device, DeviceError, HeldJob, MatrixDevice, TrunkCard, Weights};
use crate::expert::Expert;
use crate::experts::LocalExperts;
use crate::lanes::Isa;
use crate::linear::{Inputs, Matrix, kernel};
use crate::spec::MoeSpec;
use crate::{LogitsWanted, Placement, Segment, Trunk, compute_pool};

/// Rows of weights, widened.
struct Wide {
    values: Vec<f32>,
    inputs: usize,
}

impl Wide {
    fn of(matrix: &Matrix) -> Self {
        let inputs = matrix.inputs();
        let mut values = vec![f32::NAN; matrix.outputs() * inputs];
        values.chunks_exact_mut(inputs).enumerate().for_each(|(row, to)| matrix.widen_row(row, to));
        Self { values, inputs }
    }

    fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let (rows, outputs) = (x.len() / self.inputs, self.values.len() / self.inputs);
        let mut y = vec![f32::NAN; rows * outputs];
        let shape = kernel::Shape { rows, inputs: self.inputs, outputs, columns: (0, outputs) };
        let x = Inputs::new(Isa::Portable, x.as_ptr(), rows, self.inputs);
        // SAFETY: as long as the shape says; every machine has what is portable.
        unsafe { kernel::multiply(Isa::Portable, &x, self.values.as_ptr(), y.as_mut_ptr(), shape) };
        y
    }
}

#[derive(Debug, Default)]
struct Fake {
    /// Matrices that there is room for.
    room: Option<usize>,
    held: AtomicUsize,
    /// The piece of work, from one on, that fails, and all after it.
    fails_at: Option<usize>,
    /// How many matrices each piece of work was with.
    work: Mutex<Vec<usize>>,
}

impl Fake {
    fn take(&self, matrices: usize) -> Result<(), DeviceError> {
        let held = self.held.fetch_add(matrices, Ordering::Relaxed) + matrices;
        if self.room.is_some_and(|room| held > room) {
            self.held.fetch_sub(matrices, Ordering::Relaxed);
            return Err(DeviceError::NoRoom { device: "fake".into(), wanted_bytes: 1, free_bytes: 0 });
        }
        Ok(())
    }

    fn work(&self, matrices: usize) -> Result<(), DeviceError> {
        let mut work = self.work.lock().unwrap();
        work.push(matrices);
        if self.fails_at.is_some_and(|at| work.len() >= at) {
            return Err(DeviceError::Failed {
                device: "fake".into(),
                what: "computing",
                reason: "it is told to".into(),
            });
        }
        Ok(())
    }
}

impl Device for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn is_host(&self) -> bool {
        false
    }
    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }
    fn prepare(&self, _hidden_size: usize, _moe: &MoeSpec) -> Result<(), DeviceError> {
        Ok(())
    }
    fn hold(&self, expert: Expert) -> Result<Weights, DeviceError> {
        self.hold_swiglu(&expert.swiglu)
    }
    fn run(&self, jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        for HeldJob { expert, hidden, output } in jobs {
            // What fails may have written.
            output.fill(f32::NAN);
            self.work(3)?;
            let [gate, up, down] = expert.weights::<[Wide; 3]>().unwrap();
            let (mut inner, up) = (gate.multiply(hidden), up.multiply(hidden));
            let width = down.inputs;
            for (inner, up) in inner.chunks_exact_mut(width).zip(up.chunks_exact(width)) {
                // SAFETY: both are as long; every machine has what is portable.
                unsafe { kernel::silu_mul(Isa::Portable, inner.as_mut_ptr(), up.as_ptr(), width) };
            }
            output.copy_from_slice(&down.multiply(&inner));
        }
        Ok(())
    }
}

impl MatrixDevice for Fake {
    fn hold_matrix(&self, matrix: &Matrix) -> Result<Weights, DeviceError> {
        self.take(1)?;
        Ok(Box::new(Wide::of(matrix)))
    }
    fn hold_swiglu(&self, swiglu: &Swiglu) -> Result<Weights, DeviceError> {
        self.take(3)?;
        Ok(Box::new([&swiglu.gate_proj, &swiglu.up_proj, &swiglu.down_proj].map(Wide::of)))
    }
    fn multiply(&self, x: &[f32], held: &[&Weights], results: &mut [&mut [f32]]) -> Result<(), DeviceError> {
        results.iter_mut().for_each(|result| result.fill(f32::NAN));
        self.work(held.len())?;
        for (held, result) in held.iter().zip(results) {
            result.copy_from_slice(&held.downcast_ref::<Wide>().unwrap().multiply(x));
        }
        Ok(())
    }
}

/// Logits of a prompt in two pieces and of two tokens after it, beside another sequence, with the trunk on `card`.
fn logits(name: &str, card: Option<&Arc<Fake>>) -> (Vec<u32>, Option<(Placement, TrunkCard)>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let pool = Arc::new(compute_pool(2).unwrap());
    let trunk = Trunk::load(&checkpoint, pool.clone()).unwrap();
    let mut experts = LocalExperts::load(&checkpoint, pool).unwrap();
    let placed = card.map(|card| {
        let card = TrunkCard::new(Arc::clone(card) as Arc<dyn MatrixDevice>);
        (trunk.place(&card).unwrap(), card)
    });
    let (mut first, mut second) = (trunk.new_cache(), trunk.new_cache());
    let mut all = Vec::new();
    for (tokens, others) in [(&[1, 2, 3, 4, 5][..], &[7, 8][..]), (&[6, 9], &[1]), (&[10], &[2]), (&[11], &[3])] {
        let segment = |tokens, cache| Segment { tokens, cache, logits: LogitsWanted::All };
        let mut segments = [segment(tokens, &mut first), segment(others, &mut second)];
        all.extend(trunk.forward(&mut segments, &mut experts).unwrap().concat());
    }
    (all.iter().map(|logit| logit.to_bits()).collect(), placed)
}

/// A plain model, one with shared experts, and one with latent attention and a dense layer.
const MODELS: [&str; 3] = ["mixtral", "qwen2_moe", "deepseek_v3"];

#[test]
fn a_card_that_fails_at_any_piece_of_work_changes_no_bit_and_is_not_asked_again() {
    for name in MODELS {
        let (expected, _) = logits(name, None);
        let fake = Arc::new(Fake::default());
        let (found, placed) = logits(name, Some(&fake));
        let (placement, card) = placed.unwrap();
        assert!(found == expected && !card.has_failed(), "{name}");
        assert!(placement.bytes > 0 && placement.no_room_bytes == 0, "{placement:?}");
        let works = fake.work.lock().unwrap().len();
        assert!(works > 20, "{name}: {works}");
        for fails_at in 1..=works {
            let fake = Arc::new(Fake { fails_at: Some(fails_at), ..Fake::default() });
            let (found, placed) = logits(name, Some(&fake));
            assert!(found == expected, "{name}, which failed at {fails_at}");
            assert!(placed.unwrap().1.has_failed());
            assert_eq!(fake.work.lock().unwrap().len(), fails_at, "{name}: nothing after the failure");
        }
    }
}

#[test]
fn what_a_card_has_no_room_for_is_computed_here_with_the_same_bits() {
    for name in MODELS {
        let (expected, _) = logits(name, None);
        let fake = Arc::new(Fake::default());
        let (_, all) = logits(name, Some(&fake));
        let (all, _) = all.unwrap();
        for room in 0..fake.held.load(Ordering::Relaxed) {
            let fake = Arc::new(Fake { room: Some(room), ..Fake::default() });
            let (found, placed) = logits(name, Some(&fake));
            let (placement, card) = placed.unwrap();
            assert!(found == expected && !card.has_failed(), "{name} with room for {room}");
            assert!(placement.no_room_bytes > 0, "{name} with room for {room}");
            assert_eq!(placement.bytes + placement.no_room_bytes, all.bytes);
            assert_eq!(fake.work.lock().unwrap().is_empty(), room == 0);
        }
    }
}

#[test]
fn products_with_the_same_rows_are_one_piece_of_work() {
    let works = |name| {
        let fake = Arc::new(Fake::default());
        logits(name, Some(&fake));
        let work = fake.work.lock().unwrap().clone();
        // Of the last pass; four were alike.
        work[work.len() / 4 * 3..].to_vec()
    };
    // Each layer's q, k and v; o; the gate; and, where there is one, the shared expert. After the last layer the LM head.
    let expected = |layer: &[usize]| [&layer.repeat(3)[..], &[1]].concat();
    assert_eq!(works("mixtral"), expected(&[3, 1, 1]));
    assert_eq!(works("qwen2_moe"), expected(&[3, 1, 1, 3]));
}

#[test]
fn a_trunk_lies_on_the_card_that_it_was_given_first() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/mixtral");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let trunk = Trunk::load(&checkpoint, Arc::new(compute_pool(1).unwrap())).unwrap();
    let place = |fake: &Arc<Fake>| trunk.place(&TrunkCard::new(Arc::clone(fake) as Arc<dyn MatrixDevice>)).unwrap();
    let (small, other) = (Arc::new(Fake { room: Some(4), ..Fake::default() }), Arc::new(Fake::default()));
    let first = place(&small);
    assert!(first.bytes > 0 && first.no_room_bytes > 0, "{first:?}");
    assert_eq!(place(&other), first, "what has no room on the first card is not put on another");
    assert_eq!((small.held.load(Ordering::Relaxed), other.held.load(Ordering::Relaxed)), (4, 0));
}
