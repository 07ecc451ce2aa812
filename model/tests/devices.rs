//! Experts on a device have the bits that they have on the processor, alone and in any batch.
//!
//! Which device is said by `HANSE_TEST_DEVICE`, as `--device` has it; tests that need a card are ignored, and are run by
//! `HANSE_TEST_DEVICE=cuda cargo test -p hanse-model --features cuda --test devices -- --include-ignored`.

mod common;

use std::sync::Arc;

use common::{Golden, WITH_EXPERTS, bits, fixture, fixtures, largest_difference, tiny_moe};
use half::{bf16, f16};
use hanse_model::{
    Activation, Checkpoint, Cpu, Device, DeviceChoice, DeviceError, Expert, ExpertJob, HeldExpert, HeldJob, MoeSpec,
    StoredDtype, Weights, compute_pool, run_experts, run_held, tensor_shapes,
};

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

struct Noise(u32);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Mostly ordinary, some tiny, some huge, some nothing.
    fn value(&mut self) -> f32 {
        let value = self.next();
        match self.0 >> 3 & 63 {
            0 => value * 1e-7,
            1 => value * 3e3,
            2 => 0.0,
            3 => -0.0,
            _ => value,
        }
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Tells the dtype of a tensor by its name.
type DtypeOf = fn(&str) -> &'static str;

/// Writes a model of two experts with so wide rows, with values of all sizes.
fn checkpoint(hidden: usize, inner: usize, dtype: DtypeOf) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2, "vocab_size": 2,
        "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    })
    .to_string();
    let (mut header, mut data, mut noise) =
        (serde_json::Map::new(), Vec::new(), Noise(hidden as u32 * 7 + inner as u32));
    for (name, shape) in tensor_shapes(&config).unwrap() {
        let start = data.len();
        let dtype = dtype(&name);
        for value in noise.values(shape.iter().product()) {
            match dtype {
                "F32" => data.extend(value.to_le_bytes()),
                "F16" => data.extend(f16::from_f32(value).to_le_bytes()),
                _ => data.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        let place = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name, place);
    }
    let header = serde_json::Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let opened = Checkpoint::open(dir.path()).unwrap();
    (dir, opened)
}

fn expert(checkpoint: &Checkpoint, expert: usize) -> Expert {
    let (layer, _) = checkpoint.spec().moe_layers().next().unwrap();
    Expert::load(checkpoint, layer, expert).unwrap()
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
        assert_same(output, &on_cpu(expert, input), &format!("{what}, {rows:?} rows"));
    }
}

#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn every_shape_dtype_and_number_of_rows_has_the_processors_bits() {
    let devices = asked_for();
    let dtypes: [(&str, DtypeOf); 4] = [
        ("f32", |_| "F32"),
        ("f16", |_| "F16"),
        ("bf16", |_| "BF16"),
        // up_proj is Mixtral's w3.
        ("mixed", |name| if name.contains(".w3.") { "BF16" } else { "F16" }),
    ];
    // Less than a chunk, whole chunks, whole octets, and everything between.
    for (hidden, inner) in [(8, 6), (24, 16), (128, 256), (136, 200), (272, 130), (384, 40)] {
        for (name, dtype) in dtypes {
            let (_dir, checkpoint) = checkpoint(hidden, inner, dtype);
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
    let opened: Vec<Checkpoint> =
        fixtures().iter().chain([&tiny_moe()]).map(|dir| Checkpoint::open(dir).unwrap()).filter(is_plain).collect();
    for device in &devices {
        let experts: Vec<Expert> = opened.iter().map(|checkpoint| expert(checkpoint, 1)).collect();
        let held: Vec<_> =
            opened.iter().map(|checkpoint| HeldExpert::new(device, expert(checkpoint, 1)).unwrap()).collect();
        // Of all families, shapes and dtypes in one pass, and cut where a piece is full.
        let rows: Vec<usize> = (0..held.len()).map(|number| [1, 7, 2, 40, 100, 3][number % 6]).collect();
        compare(&held, &experts, &rows, 11, device.name());
        compare(&held[..3], &experts[..3], &[300, 256, 700], 12, device.name());
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

/// Cards compute SwiGLUs without biases, the processor all.
#[test]
#[ignore = "needs HANSE_TEST_DEVICE"]
fn a_device_refuses_what_it_cannot_compute_before_it_takes_anything() {
    let checkpoint = Checkpoint::open(&fixture("gpt_oss")).unwrap();
    let (_, moe) = checkpoint.spec().moe_layers().next().unwrap();
    for device in asked_for().into_iter().filter(|device| !device.is_host()) {
        let refused = [
            device.prepare(checkpoint.spec().hidden_size, moe).unwrap_err(),
            HeldExpert::new(&device, expert(&checkpoint, 0)).map(|_| ()).unwrap_err(),
        ];
        for error in refused {
            assert!(
                matches!(&error, DeviceError::Unsupported { device: name, .. } if name == device.name()),
                "{error}"
            );
        }
    }
}

fn is_plain(checkpoint: &Checkpoint) -> bool {
    let first = checkpoint.spec().moe_layers().next();
    first.is_some_and(|(_, moe)| moe.activation == Activation::Swiglu && !moe.expert_biases)
}

fn reference_rows(device: &Arc<dyn Device>) {
    for name in WITH_EXPERTS {
        let golden = Golden::open(&fixture(name));
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        if !device.is_host() && !is_plain(&checkpoint) {
            continue;
        }
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
    fn supports(&self, _dtypes: &[StoredDtype]) -> Result<(), DeviceError> {
        Ok(())
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
