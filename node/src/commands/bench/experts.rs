//! How fast the model's experts are computed here, beside what this machine does at best.
//!
//! Each figure is the best of some rounds, since other programs only ever slow a measurement down; what it is compared with
//! is measured in the same rounds.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_model::peak::{multiply_add, read_through};
use hanse_model::{Checkpoint, Expert, ExpertJob, compute_pool, run_experts};
use rayon::ThreadPool;
use rayon::prelude::*;
use serde::Serialize;

use crate::output::say;

const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 64, 256, 512];
/// Experts are gone through in turn, as many as this holds: far more than a cache does, if the model has so many.
const WEIGHT_BYTES: u64 = 256 << 20;
/// A measurement goes on for so long, at the speed of the first.
const SLOT: Duration = Duration::from_millis(1);
const ROUNDS: usize = 40;
/// About half a millisecond of work.
const FMA_ROUNDS: usize = 1 << 17;

#[derive(Serialize)]
pub(super) struct Report {
    hidden_size: usize,
    intermediate_size: usize,
    bytes_per_value: f64,
    /// Experts gone through, of one layer or of several.
    experts: usize,
    bytes_per_expert: u64,
    runs: Vec<Run>,
}

/// So many rows of one expert.
#[derive(Serialize)]
struct Run {
    threads: usize,
    rows: usize,
    us: f64,
    /// Bytes of weights, 1e9 a second, and as a share of reading as many bytes from as much memory.
    weights_gbs: f64,
    of_reading: f64,
    /// 1e9 a second; a multiplication and an addition are two. And as a share of doing so in registers only.
    gflops: f64,
    of_multiplying: f64,
}

pub(super) fn run(dir: &Path) -> anyhow::Result<Report> {
    let checkpoint = Checkpoint::open(dir)?;
    let spec = checkpoint.spec();
    let (_, moe) = spec.moe_layers().next().context("the model has no experts")?;
    let mut experts = Vec::new();
    let mut bytes = 0;
    'all: for (layer, moe) in spec.moe_layers() {
        for expert in 0..moe.experts {
            if bytes >= WEIGHT_BYTES {
                break 'all;
            }
            let expert = Expert::load(&checkpoint, layer, expert)?;
            bytes += expert.bytes();
            experts.push(expert);
        }
    }
    let weights = 3 * spec.hidden_size * moe.intermediate_size;
    let memory = vec![1.0f32; usize::try_from(bytes)? / 4];
    let cores = std::thread::available_parallelism()?.get();
    let mut runs = Vec::new();
    for threads in if cores > 1 { vec![1, cores] } else { vec![1] } {
        let pool = compute_pool(threads)?;
        for rows in ROWS {
            runs.push(measure(&experts, weights, &memory, rows, &pool));
        }
    }
    Ok(Report {
        hidden_size: spec.hidden_size,
        intermediate_size: moe.intermediate_size,
        bytes_per_value: experts[0].bytes() as f64 / weights as f64,
        experts: experts.len(),
        bytes_per_expert: experts[0].bytes(),
        runs,
    })
}

/// `weights` are the values of one expert; `memory` is as large as all experts.
fn measure(experts: &[Expert], weights: usize, memory: &[f32], rows: usize, pool: &ThreadPool) -> Run {
    let threads = pool.current_num_threads();
    let size = experts[0].hidden_size();
    let hidden: Vec<f32> = (0..rows * size).map(|i| (i % 31) as f32 * 0.1 - 1.5).collect();
    let mut output = vec![0.0; hidden.len()];
    let mut turn = experts.iter().cycle();
    let mut compute = |times: usize| {
        let started = Instant::now();
        for expert in turn.by_ref().take(times) {
            run_experts(&mut [ExpertJob { expert, hidden: &hidden, output: &mut output }], pool);
        }
        started.elapsed()
    };
    let first = compute(experts.len().min(4)) / experts.len().min(4) as u32;
    let times = (SLOT.as_nanos() / first.as_nanos().max(1)).clamp(1, 1 << 14) as usize;
    let block = (memory.len() / experts.len() * times).min(memory.len());
    let (mut computing, mut reading, mut multiplying) = (Duration::MAX, Duration::MAX, Duration::MAX);
    let mut at = 0;
    for _ in 0..ROUNDS {
        computing = computing.min(compute(times));
        if at + block > memory.len() {
            at = 0;
        }
        let part = &memory[at..at + block];
        at += block;
        reading = reading.min(together(pool, |thread| {
            let share = part.len() / threads;
            black_box(read_through(&part[thread * share..(thread + 1) * share]));
        }));
        multiplying = multiplying.min(together(pool, |_| {
            black_box(multiply_add(FMA_ROUNDS));
        }));
    }
    let seconds = computing.as_secs_f64() / times as f64;
    let bytes = experts[0].bytes() as f64;
    let weights_gbs = bytes / seconds / 1e9;
    let read_gbs = block as f64 * 4.0 / reading.as_secs_f64() / 1e9;
    let gflops = 2.0 * (rows * weights) as f64 / seconds / 1e9;
    let peak = multiply_add(FMA_ROUNDS) as f64 * threads as f64 / multiplying.as_secs_f64() / 1e9;
    Run {
        threads,
        rows,
        us: seconds * 1e6,
        weights_gbs,
        of_reading: weights_gbs / read_gbs,
        gflops,
        of_multiplying: gflops / peak,
    }
}

/// How long it takes until every thread of the pool has done its part.
fn together(pool: &ThreadPool, part: impl Fn(usize) + Sync) -> Duration {
    let started = Instant::now();
    if pool.current_num_threads() == 1 {
        part(0);
    } else {
        pool.install(|| (0..pool.current_num_threads()).into_par_iter().with_max_len(1).for_each(&part));
    }
    started.elapsed()
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!(
            "experts    {} of hidden {} x {}, {} bytes a value, one at a time",
            self.experts,
            self.hidden_size,
            self.intermediate_size,
            self.bytes_per_value
        );
        say!("           threads rows        us   GB/s of reading   GFLOP/s of multiplying");
        for run in &self.runs {
            say!(
                "           {:7} {:4} {:9.1} {:6.1} {:8.0} % {:9.1} {:12.0} %",
                run.threads,
                run.rows,
                run.us,
                run.weights_gbs,
                run.of_reading * 100.0,
                run.gflops,
                run.of_multiplying * 100.0
            );
        }
        Ok(())
    }
}
