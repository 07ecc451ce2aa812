//! Experts on a device have the bits that they have on the processor, alone and in any batch.
//!
//! Which device is said by `HANSE_TEST_DEVICE`, as `--device` has it; tests that need a card are ignored, and are run by
//! `HANSE_TEST_DEVICE=cuda cargo test -p hanse-model --features cuda --test devices -- --include-ignored`.

#[path = "devices/checkpoint.rs"]
mod checkpoint;
mod common;

use std::sync::Arc;

use checkpoint::{DtypeOf, Noise, checkpoint, gpt_oss, mixtral};
use common::{Golden, WITH_EXPERTS, bits, fixture, fixtures, largest_difference, tiny_moe};
use hanse_model::{
    Checkpoint, Cpu, Device, DeviceChoice, DeviceError, Expert, ExpertJob, HeldExpert, HeldJob, MoeSpec, Weights,
    compute_pool, run_experts, run_held,
};
use serde_json::Value;

/// The devices that are asked for.
fn asked_for() -> Vec<Arc<dyn Device>> {
    let name = std::env::var("HANSE_TEST_DEVICE").expect("HANSE_TEST_DEVICE says which device is tested");
    let choice: DeviceChoice = name.parse().unwrap();
    let devices = choice.open(Arc::new(compute_pool(2).unwrap())).unwrap();
    assert!(choice == DeviceChoice::Cpu || devices.iter().all(|device| !device.is_host()), "the processor is no card");
    devices
}

fn cpu() -> Arc<dyn Device> {
    Arc::new(Cpu::new(Arc::new(compute_pool(2).unwrap())))
}

fn expert(checkpoint: &Checkpoint, expert: usize) -> Expert {
    let (layer, _) = checkpoint.spec().moe_layers().next().unwrap();
    Expert::load(checkpoint, layer, expert).unwrap()
}

/// Whether a device takes floats below 2^-126 for zero, as Apple's GPUs do. Then a sum that has such a part may be rounded the other way.
fn flushes(device: &dyn Device) -> bool {
    device.name() == "metal" || std::env::var_os("HANSE_EMULATED_FLUSH").is_some_and(|value| value == "1")
}

/// The same values but for what sums may differ by that are rounded the other way: the tolerance is of the largest value.
fn assert_near(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let difference = largest_difference(found, expected);
    let different =
        found.iter().zip(expected).filter(|(found, expected)| found.to_bits() != expected.to_bits()).count();
    let part = difference / largest;
    println!("{what}: {different} of {} values differ, by at most {part:e} of the largest", found.len());
    assert!(difference <= largest * 1e-6, "{what}: differs by {difference:e} where the largest is {largest:e}");
}

/// The same bits; what is no number may be written in several ways.
fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(same, "{what}: value {at} is {found:e} and should be {expected:e}");
    }
}

fn on_cpu(expert: &Expert, hidden: &[f32]) -> Vec<f32> {
    let mut output = vec![f32::NAN; hidden.len()];
    run_experts(&mut [ExpertJob { expert, hidden, output: &mut output }], &compute_pool(1).unwrap());
    output
}

/// Runs held experts, each on its rows, in one pass, and compares with what the processor gives.
fn compare(held: &[HeldExpert], experts: &[Expert], rows: &[usize], seed: u32, what: &str) {
    let mut noise = Noise(seed);
    let inputs: Vec<Vec<f32>> =
        held.iter().zip(rows).map(|(held, rows)| noise.values(rows * held.hidden_size())).collect();
    let mut outputs: Vec<Vec<f32>> = inputs.iter().map(|input| vec![f32::NAN; input.len()]).collect();
    let mut jobs: Vec<HeldJob<'_>> = held
        .iter()
        .zip(&inputs)
        .zip(&mut outputs)
        .map(|((expert, hidden), output)| HeldJob { expert, hidden, output })
        .collect();
    let failed = run_held(&mut jobs);
    assert!(failed.is_empty(), "{what}: {failed:?}");
    for ((expert, input), output) in experts.iter().zip(&inputs).zip(&outputs) {
        assert!(output.iter().all(|value| value.is_finite()), "{what}: all can be compared");
        let check = if held.iter().any(|held| flushes(held.device().as_ref())) { assert_near } else { assert_same };
        check(output, &on_cpu(expert, input), &format!("{what}, {rows:?} rows"));
    }
}

/// Models with experts in one way each: what it is, the model's config for widths of hidden states and within, how tensors are stored, and
/// which widths.
type Way = (&'static str, fn(usize, usize) -> Value, DtypeOf, &'static [(usize, usize)]);

/// Less than a chunk, whole chunks, whole octets, and everything between.
const WIDTHS: &[(usize, usize)] = &[(8, 6), (24, 16), (128, 256), (136, 200), (272, 130), (384, 40)];
/// The same in whole blocks of 32.
const BLOCKS: &[(usize, usize)] = &[(32, 32), (160, 96), (128, 256), (288, 416)];

/// All dtypes, and those that an expert may have at a time. up_proj is Mixtral's w3, down_proj w2.
const WAYS: [Way; 15] = [
    ("f32", mixtral, |_| "F32", WIDTHS),
    ("f16", mixtral, |_| "F16", WIDTHS),
    ("bf16", mixtral, |_| "BF16", WIDTHS),
    ("f16 and bf16", mixtral, |name| if name.contains(".w3.") { "BF16" } else { "F16" }, WIDTHS),
    ("q8_0", mixtral, |_| "Q8_0", BLOCKS),
    ("q4_k", mixtral, |_| "Q4_K", &[(256, 256), (768, 256), (256, 512)]),
    ("fp8", mixtral, |_| "F8_E4M3", WIDTHS),
    ("q4_k and q8_0", mixtral, |name| if name.contains(".w2.") { "Q8_0" } else { "Q4_K" }, &[(256, 96), (512, 160)]),
    ("q8_0 and q4_k", mixtral, |name| if name.contains(".w2.") { "Q4_K" } else { "Q8_0" }, &[(96, 256), (160, 512)]),
    ("q8_0 and f16", mixtral, |name| if name.contains(".w2.") { "F16" } else { "Q8_0" }, &[(64, 40), (160, 6)]),
    ("widened", mixtral, |name| if name.contains(".w3.") { "Q4_K" } else { "Q8_0" }, &[(256, 32), (512, 160)]),
    ("gpt-oss in f32", gpt_oss, |_| "F32", WIDTHS),
    ("gpt-oss in f16", gpt_oss, |_| "F16", WIDTHS),
    ("gpt-oss in bf16", gpt_oss, |_| "BF16", WIDTHS),
    ("gpt-oss in mxfp4", gpt_oss, |_| "F4", BLOCKS),
];

#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn every_shape_dtype_and_number_of_rows_has_the_processors_bits() {
    let devices = asked_for();
    for (name, config, dtype, widths) in WAYS {
        for &(hidden, inner) in widths {
            let (_dir, checkpoint) = checkpoint(&config(hidden, inner), dtype);
            let experts = [expert(&checkpoint, 0), expert(&checkpoint, 1)];
            for device in &devices {
                let hold = |number| HeldExpert::new(device, expert(&checkpoint, number)).unwrap();
                let held = [hold(0), hold(1)];
                let what = format!("{} {name} {hidden} x {inner}", device.name());
                for rows in [[1, 0], [2, 1], [3, 1], [1, 9], [17, 33], [8, 65]] {
                    compare(&held, &experts, &rows, hidden as u32 + rows[0] as u32, &what);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn passes_of_several_pieces_and_of_many_experts_have_the_processors_bits() {
    let devices = asked_for();
    let made: Vec<_> =
        WAYS.iter().map(|(_, config, dtype, widths)| checkpoint(&config(widths[0].0, widths[0].1), *dtype)).collect();
    let published = fixtures().into_iter().chain([tiny_moe()]).map(|dir| Checkpoint::open(&dir).unwrap());
    let mut opened: Vec<Checkpoint> =
        published.filter(|checkpoint| checkpoint.spec().moe_layers().next().is_some()).collect();
    opened.extend(made.iter().map(|(dir, _)| Checkpoint::open(dir.path()).unwrap()));
    for device in &devices {
        let experts: Vec<Expert> = opened.iter().map(|checkpoint| expert(checkpoint, 1)).collect();
        let held: Vec<_> =
            opened.iter().map(|checkpoint| HeldExpert::new(device, expert(checkpoint, 1)).unwrap()).collect();
        // Of all families, shapes and dtypes in one pass, and cut where a piece is full.
        let rows: Vec<usize> = (0..held.len()).map(|number| [1, 7, 2, 40, 100, 3][number % 6]).collect();
        compare(&held, &experts, &rows, 11, device.name());
        let from = held.len() - WAYS.len();
        for first in [0, from + 4, from + 7, from + 12] {
            compare(&held[first..][..3], &experts[first..][..3], &[300, 256, 700], 12, device.name());
        }
    }
}

#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn a_row_on_a_device_has_the_same_bits_alone_and_in_any_batch() {
    let checkpoint = Checkpoint::open(&tiny_moe()).unwrap();
    for device in asked_for() {
        let held: Vec<_> =
            (0..3).map(|number| HeldExpert::new(&device, expert(&checkpoint, number)).unwrap()).collect();
        let width = held[0].hidden_size();
        let input = Noise(7).values(67 * width);
        let mut together = vec![vec![f32::NAN; input.len()]; held.len()];
        let mut jobs: Vec<_> = held
            .iter()
            .zip(&mut together)
            .map(|(expert, output)| HeldJob { expert, hidden: &input, output })
            .rev()
            .collect();
        assert!(run_held(&mut jobs).is_empty());
        for (expert, together) in held.iter().zip(&together) {
            for (hidden, together) in input.chunks(width).zip(together.chunks(width)).step_by(7) {
                let mut alone = vec![f32::NAN; width];
                assert!(run_held(&mut [HeldJob { expert, hidden, output: &mut alone }]).is_empty());
                assert_eq!(bits(&alone), bits(together), "{}", device.name());
            }
        }
    }
}

#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn experts_on_a_device_give_the_reference_rows() {
    for device in asked_for() {
        reference_rows(&device);
    }
}

#[test]
fn experts_held_by_the_processor_give_the_reference_rows() {
    reference_rows(&cpu());
}

fn reference_rows(device: &Arc<dyn Device>) {
    for name in WITH_EXPERTS {
        let golden = Golden::open(&fixture(name));
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let (layer, moe) = checkpoint.spec().moe_layers().next().unwrap();
        let hidden = golden.f32(&format!("p1.layer{layer}.mlp_in")).unwrap();
        let expected = golden.f32(&format!("p1.layer{layer}.expert_out")).unwrap();
        let std = (expected.iter().map(|v| v * v).sum::<f32>() / expected.len() as f32).sqrt();
        for (expert, expected) in (0..moe.experts).zip(expected.chunks(hidden.len())) {
            let expert = Expert::load(&checkpoint, layer, expert).unwrap();
            let held = HeldExpert::new(device, expert).unwrap();
            let mut output = vec![0.0; hidden.len()];
            assert!(run_held(&mut [HeldJob { expert: &held, hidden: &hidden, output: &mut output }]).is_empty());
            assert!(largest_difference(&output, expected) <= 1e-4 * std, "{name}");
        }
    }
}

/// Holds experts and computes none.
#[derive(Debug)]
struct Broken;

fn broken() -> DeviceError {
    DeviceError::Failed { device: "broken".into(), what: "computing", reason: "it is broken".into() }
}

impl Device for Broken {
    fn name(&self) -> &str {
        "broken"
    }
    fn is_host(&self) -> bool {
        false
    }
    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        Err(broken())
    }
    fn prepare(&self, _hidden_size: usize, _moe: &MoeSpec) -> Result<(), DeviceError> {
        Ok(())
    }
    fn hold(&self, _expert: Expert) -> Result<Weights, DeviceError> {
        Ok(Box::new(()))
    }
    fn run(&self, _jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        Err(broken())
    }
}

#[test]
fn a_device_that_fails_takes_no_other_ones_jobs_with_it() {
    let checkpoint = Checkpoint::open(&fixture("mixtral")).unwrap();
    let bad: Arc<dyn Device> = Arc::new(Broken);
    let held: Vec<_> = [cpu(), bad, cpu()]
        .iter()
        .enumerate()
        .map(|(number, device)| HeldExpert::new(device, expert(&checkpoint, number)).unwrap())
        .collect();
    let input = Noise(3).values(5 * held[0].hidden_size());
    let mut outputs = vec![vec![f32::NAN; input.len()]; 3];
    let mut jobs: Vec<_> =
        held.iter().zip(&mut outputs).map(|(expert, output)| HeldJob { expert, hidden: &input, output }).collect();
    let failed = run_held(&mut jobs);
    assert_eq!(
        failed.iter().map(|(device, error)| (device.name(), error)).collect::<Vec<_>>(),
        [("broken", &broken())]
    );
    for number in [0, 2] {
        assert_same(&outputs[number], &on_cpu(&expert(&checkpoint, number), &input), "beside a broken device");
    }
}

#[test]
fn a_device_refuses_an_expert_that_is_not_its_own() {
    let checkpoint = Checkpoint::open(&fixture("mixtral")).unwrap();
    let held = HeldExpert::new(&(Arc::new(Broken) as Arc<dyn Device>), expert(&checkpoint, 0)).unwrap();
    let hidden = vec![1.0; held.hidden_size()];
    let mut output = hidden.clone();
    let error = cpu().run(&mut [HeldJob { expert: &held, hidden: &hidden, output: &mut output }]).unwrap_err();
    assert!(error.to_string().contains("another device holds it"), "{error}");
}
