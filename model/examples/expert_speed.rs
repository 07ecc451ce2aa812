//! How fast experts run on this machine beside a library's matrix products and candle, in one thread:
//! `cargo run --release -p hanse-model --example expert_speed`.
//!
//! Writes a random checkpoint with experts of 2048 x 768 to a temporary folder and goes through them in turn, so that
//! weights come from memory and not from a cache. The others have their weights as f32 in memory, twice what is stored; they
//! take turns with hanse, and each time is the best of some. GFLOP/s counts two per multiplication.

use std::time::Instant;

use candle_core::{Device, Tensor};
use hanse_model::{Checkpoint, Expert, ExpertJob, compute_pool, run_experts};

#[path = "speed/random.rs"]
mod random;

use random::{EXPERTS, HIDDEN, WIDTH, checkpoint};

/// An expert as f32, as the others need it: gate, up, down.
struct Wide([(Vec<f32>, Tensor); 3]);

impl Wide {
    fn new() -> candle_core::Result<Self> {
        let matrix = |outputs: usize, inputs: usize| {
            let values = vec![0.01f32; outputs * inputs];
            let tensor = Tensor::from_slice(&values, (outputs, inputs), &Device::Cpu)?;
            candle_core::Result::Ok((values, tensor))
        };
        Ok(Self([matrix(WIDTH, HIDDEN)?, matrix(WIDTH, HIDDEN)?, matrix(HIDDEN, WIDTH)?]))
    }

    fn candle(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let [gate, up, down] = &self.0;
        let middle = (x.matmul(&gate.1.t()?)?.silu()? * x.matmul(&up.1.t()?)?)?;
        middle.matmul(&down.1.t()?)
    }

    /// The three products alone.
    fn gemm(&self, x: &[f32], rows: usize, middle: &mut [f32], output: &mut [f32]) {
        let [gate, up, down] = &self.0;
        product(x, &gate.0, middle, rows);
        product(x, &up.0, middle, rows);
        product(middle, &down.0, output, rows);
    }
}

/// `y = x W^T`
fn product(x: &[f32], w: &[f32], y: &mut [f32], rows: usize) {
    let (inputs, outputs) = (x.len() / rows, y.len() / rows);
    assert_eq!(w.len(), inputs * outputs);
    let (across, down) = (inputs as isize, outputs as isize);
    let one_thread = gemm::Parallelism::None;
    // SAFETY: x is [rows, inputs], w [outputs, inputs] and y [rows, outputs].
    unsafe {
        let (x, w, y) = (x.as_ptr(), w.as_ptr(), y.as_mut_ptr());
        gemm::gemm(
            rows, outputs, inputs, y, 1, down, false, x, 1, across, w, across, 1, 0.0, 1.0, false, false, false,
            one_thread,
        );
    }
}

fn timed(run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    started.elapsed().as_secs_f64()
}

fn main() -> candle_core::Result<()> {
    let wide: Vec<Wide> = (0..EXPERTS).map(|_| Wide::new()).collect::<Result<_, _>>()?;
    // Candle's products run in one thread of this pool.
    let pool = compute_pool(1).expect("a pool");
    println!("dtype rows   hanse GB/s  GFLOP/s | gemm f32 GFLOP/s  hanse/gemm | candle f32 GFLOP/s  hanse/candle");
    for (dtype, value_bytes) in [("F32", 4), ("F16", 2), ("BF16", 2)] {
        let dir = checkpoint(dtype, value_bytes);
        let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
        let experts: Vec<Expert> = (0..EXPERTS).map(|e| Expert::load(&checkpoint, 0, e).expect("an expert")).collect();
        for rows in [1, 2, 4, 8, 16, 64, 256, 1024] {
            let hidden = vec![0.5; rows * HIDDEN];
            let tensor = Tensor::from_slice(&hidden, (rows, HIDDEN), &Device::Cpu)?;
            let (mut middle, mut output) = (vec![0.0; rows * WIDTH], vec![0.0; rows * HIDDEN]);
            let mut best = [f64::MAX; 3];
            for (expert, wide) in experts.iter().zip(&wide) {
                let hanse = || run_experts(&mut [ExpertJob { expert, hidden: &hidden, output: &mut output }], &pool);
                best[0] = best[0].min(timed(hanse));
                best[1] = best[1].min(timed(|| wide.gemm(&hidden, rows, &mut middle, &mut output)));
                let candle = || drop(pool.install(|| wide.candle(&tensor)).expect("a product"));
                best[2] = best[2].min(timed(candle));
            }
            let weights = (3 * HIDDEN * WIDTH) as f64;
            let rate = |seconds: f64| 2.0 * weights * rows as f64 / seconds / 1e9;
            println!(
                "{dtype:5} {rows:4} {:12.1} {:8.1} | {:16.1} {:11.2} | {:18.1} {:13.2}",
                weights * f64::from(value_bytes) / best[0] / 1e9,
                rate(best[0]),
                rate(best[1]),
                best[1] / best[0],
                rate(best[2]),
                best[2] / best[0],
            );
        }
    }
    Ok(())
}
