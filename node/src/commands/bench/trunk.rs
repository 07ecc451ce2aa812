//! How fast everything but the routed experts is computed: decoding behind a short and a long context, many sequences at
//! once, and pieces of a prompt. Experts answer with zeros at once.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use hanse_model::peak::read_through;
use hanse_model::{
    Checkpoint, DeviceChoice, Experts, ExpertsError, KvCache, LogitsWanted, Routing, Segment, Trunk, TrunkCard,
    compute_pool,
};
use serde::Serialize;

use crate::output::say;

/// Positions before those that are timed, where the model has room for them.
const CONTEXTS: [usize; 3] = [16, 1024, 3584];
/// Sequences that are decoded together.
const TOGETHER: usize = 32;
/// Rows of a piece of a prompt, as the engine cuts it.
const PIECE: usize = 256;
const ROUNDS: usize = 7;

#[derive(Serialize)]
pub(super) struct Report {
    trunk_bytes: u64,
    /// Reading memory in one thread, 1e9 bytes a second.
    read_gbs_one_core: f64,
    runs: Vec<Run>,
}

/// One forward pass; the best of some.
#[derive(Serialize)]
struct Run {
    /// What multiplies with the trunk's matrices.
    device: String,
    threads: usize,
    sequences: usize,
    /// New tokens of each sequence.
    tokens: usize,
    /// Positions before them.
    context: usize,
    ms: f64,
    tokens_per_second: f64,
}

struct Zeros;

impl Experts for Zeros {
    fn forward(&mut self, _: usize, hidden: &[f32], _: &Routing) -> Result<Vec<f32>, ExpertsError> {
        Ok(vec![0.0; hidden.len()])
    }
}

pub(super) fn run(dir: &Path, device: &DeviceChoice) -> anyhow::Result<Report> {
    let card = device.open_for_trunk()?;
    let checkpoint = Checkpoint::open(dir)?;
    let cores = std::thread::available_parallelism()?.get();
    let most = checkpoint.spec().max_positions;
    let mut runs = Vec::new();
    let threads = if cores > 1 { vec![1, cores] } else { vec![1] };
    let here = threads.into_iter().map(|threads| (threads, None));
    for (threads, card) in here.chain(card.as_ref().map(|card| (cores, Some(card)))) {
        let trunk = Trunk::load(&checkpoint, Arc::new(compute_pool(threads)?))?;
        if let Some(card) = card {
            trunk.place(card)?;
        }
        let device = card.map_or("cpu", TrunkCard::name);
        for context in CONTEXTS {
            for (sequences, tokens) in [(1, 1), (TOGETHER, 1), (1, PIECE)] {
                // Many long sequences would need many times the memory and say nothing new.
                if context + tokens <= most && (sequences == 1 || context == CONTEXTS[0]) {
                    runs.push(measure(&trunk, device, threads, sequences, tokens, context)?);
                }
            }
        }
    }
    if card.as_ref().is_some_and(TrunkCard::has_failed) {
        bail!("the card failed, so that the processor was measured in its place");
    }
    let memory = vec![1.0f32; 64 << 20];
    let read = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        std::hint::black_box(read_through(&memory));
        started.elapsed()
    });
    let read = read.min().unwrap_or_default();
    Ok(Report {
        trunk_bytes: checkpoint.sizes().trunk_bytes,
        read_gbs_one_core: memory.len() as f64 * 4.0 / read.as_secs_f64() / 1e9,
        runs,
    })
}

fn measure(
    trunk: &Trunk,
    device: &str,
    threads: usize,
    sequences: usize,
    tokens: usize,
    context: usize,
) -> anyhow::Result<Run> {
    let vocab = trunk.spec().vocab_size as u32;
    let token = |i: usize| (i as u32 * 37 + 1) % vocab;
    let mut before = trunk.new_cache();
    let prompt: Vec<u32> = (0..context).map(token).collect();
    for piece in prompt.chunks(PIECE) {
        let segment = Segment { tokens: piece, cache: &mut before, logits: LogitsWanted::None };
        trunk.forward(&mut [segment], &mut Zeros)?;
    }
    let mut caches: Vec<KvCache> = vec![before; sequences];
    let next: Vec<u32> = (context..context + tokens).map(token).collect();
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let segment = |cache| Segment { tokens: &next, cache, logits: LogitsWanted::Last };
        let mut segments: Vec<_> = caches.iter_mut().map(segment).collect();
        let started = Instant::now();
        trunk.forward(&mut segments, &mut Zeros)?;
        best = best.min(started.elapsed());
        caches.iter_mut().for_each(|cache| cache.truncate(context));
    }
    let seconds = best.as_secs_f64();
    let tokens_per_second = (sequences * tokens) as f64 / seconds;
    Ok(Run { device: device.to_owned(), threads, sequences, tokens, context, ms: seconds * 1e3, tokens_per_second })
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let bytes = crate::output::bytes(self.trunk_bytes);
        say!("trunk      {bytes}, the experts answer at once; one core reads {:.1} GB/s", self.read_gbs_one_core);
        say!("           device threads sequences tokens context        ms   tokens/s");
        for run in &self.runs {
            say!(
                "           {:6} {:7} {:9} {:6} {:7} {:9.2} {:10.1}",
                run.device,
                run.threads,
                run.sequences,
                run.tokens,
                run.context,
                run.ms,
                run.tokens_per_second
            );
        }
        Ok(())
    }
}
