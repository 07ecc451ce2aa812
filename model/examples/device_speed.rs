//! How fast a device computes experts beside the processor:
//! `cargo run --release -p hanse-model --features cuda --example device_speed -- cuda:0`, or `--features metal` and `metal`.
//!
//! Passes of eight experts of 2048 x 768, as a node gets them, with as many rows for each as the line says; other experts each time. The
//! time is that of a pass as the batcher sees it, with copies there and back: the best of some. Bytes are those of the weights
//! that a pass reads; GFLOP/s counts two per multiplication. Every row is compared with the processor's, bit by bit.

#[path = "speed/random.rs"]
mod random;

use std::sync::Arc;
use std::time::Instant;

use hanse_model::{
    Checkpoint, Cpu, Device, DeviceChoice, Expert, HeldExpert, HeldJob, Precision, StoredDtype, compute_pool,
    quantise_folder, run_held,
};
use random::{EXPERTS, HIDDEN, WIDTH, checkpoint};

/// Experts of a pass.
const TOGETHER: usize = 8;
/// Rows of a batcher's largest pass, divided among its experts.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 128];

/// The best time of a pass in seconds, and the output of the first.
fn measure(held: &[HeldExpert], hidden: &[f32], rounds: usize) -> (f64, Vec<f32>) {
    let mut outputs = vec![vec![f32::NAN; hidden.len()]; TOGETHER];
    let (mut best, mut first) = (f64::MAX, Vec::new());
    for round in 0..rounds {
        let experts = held.iter().cycle().skip(round * TOGETHER % EXPERTS);
        let jobs = experts.zip(&mut outputs).map(|(expert, output)| HeldJob { expert, hidden, output });
        let mut jobs: Vec<HeldJob<'_>> = jobs.collect();
        let started = Instant::now();
        let failed = run_held(&mut jobs);
        best = best.min(started.elapsed().as_secs_f64());
        assert!(failed.is_empty(), "{failed:?}");
        if round == 0 {
            first = outputs.concat();
        }
    }
    (best, first)
}

/// A checkpoint with experts in a dtype.
fn folder(dtype: StoredDtype) -> Result<tempfile::TempDir, Box<dyn std::error::Error>> {
    if !dtype.is_quantised() {
        return Ok(checkpoint(dtype.name(), dtype.block().1 as u8));
    }
    let (wide, folder) = (checkpoint("BF16", 2), tempfile::tempdir()?);
    let precision = Precision { experts: dtype, trunk: None };
    quantise_folder(&Checkpoint::open(wide.path())?, precision, &"0".repeat(64), &[], folder.path(), &mut |_, _| ())?;
    Ok(folder)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1).ok_or("which device? for example cuda:0")?;
    let rounds = std::env::args().nth(2).map_or(Ok(50), |rounds| rounds.parse())?;
    let pool = Arc::new(compute_pool(0)?);
    let cpu: Arc<dyn Device> = Arc::new(Cpu::new(pool.clone()));
    let opened = name.parse::<DeviceChoice>()?.open(pool)?;
    let device = opened.first().ok_or("no device")?;
    println!("dtype rows |  {} us     GB/s   GFLOP/s |    cpu us  times as fast", device.name());
    for stored in [StoredDtype::F32, StoredDtype::F16, StoredDtype::Bf16, StoredDtype::Q8_0, StoredDtype::Q4K] {
        let dtype = stored.name();
        let dir = folder(stored)?;
        let checkpoint = Checkpoint::open(dir.path())?;
        let bytes = Expert::load(&checkpoint, 0, 0)?.bytes() * TOGETHER as u64;
        let hold = |device: &Arc<dyn Device>| {
            let held = (0..EXPERTS).map(|e| Ok(HeldExpert::new(device, Expert::load(&checkpoint, 0, e)?)?));
            held.collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()
        };
        let (on_device, on_cpu) = (hold(device)?, hold(&cpu)?);
        for rows in ROWS {
            let hidden: Vec<f32> = (0..rows * HIDDEN).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            let (seconds, found) = measure(&on_device, &hidden, rounds);
            let (beside, expected) = measure(&on_cpu, &hidden, rounds.min(5));
            let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{dtype}, {rows} rows: other bits than the processor's");
            let weights = (TOGETHER * 3 * HIDDEN * WIDTH) as f64;
            println!(
                "{dtype:5} {rows:4} | {:10.1} {:8.1} {:9.1} | {:9.1} {:14.1}",
                seconds * 1e6,
                bytes as f64 / seconds / 1e9,
                2.0 * weights * rows as f64 / seconds / 1e9,
                beside * 1e6,
                beside / seconds,
            );
        }
    }
    Ok(())
}
