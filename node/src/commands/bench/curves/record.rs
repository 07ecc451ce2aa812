//! Forward passes written down, to be asked again: the same rows of the same experts without the trunk between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_model::{Experts, ExpertsError, KvCache, LocalExperts, LogitsWanted, Routing, Segment, Trunk};
use hanse_router::stats::quantile_of;

/// What one layer of a pass was asked.
#[derive(Debug)]
pub(super) struct LayerCall {
    pub(super) layer: usize,
    /// `[rows, hidden_size]`
    hidden: Vec<f32>,
    pub(super) routing: Routing,
}

/// The MoE layers of one forward pass.
pub(super) type Pass = Vec<LayerCall>;

struct Recorder {
    experts: Arc<LocalExperts>,
    pass: Pass,
}

impl Experts for Recorder {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        self.pass.push(LayerCall { layer, hidden: hidden.to_vec(), routing: routing.clone() });
        self.experts.forward(layer, hidden, routing)
    }
}

/// The pass over each prompt, alone and in one piece.
pub(super) fn prompts(trunk: &Trunk, experts: &Arc<LocalExperts>, prompts: &[Vec<u32>]) -> anyhow::Result<Vec<Pass>> {
    let mut recorder = Recorder { experts: experts.clone(), pass: Vec::new() };
    let record = |prompt: &Vec<u32>| {
        let mut cache = trunk.new_cache();
        trunk
            .forward(&mut [Segment { tokens: prompt, cache: &mut cache, logits: LogitsWanted::None }], &mut recorder)?;
        Ok(std::mem::take(&mut recorder.pass))
    };
    prompts.iter().map(record).collect()
}

/// The first `passes` decode steps of all prompts together, each time with the likeliest tokens.
pub(super) fn decoding(
    trunk: &Trunk,
    experts: &Arc<LocalExperts>,
    prompts: &[Vec<u32>],
    passes: usize,
) -> anyhow::Result<Vec<Pass>> {
    let mut recorder = Recorder { experts: experts.clone(), pass: Vec::new() };
    let mut caches: Vec<KvCache> = prompts.iter().map(|_| trunk.new_cache()).collect();
    let mut tokens = prompts.to_vec();
    let mut recorded = Vec::new();
    for _ in 0..=passes {
        let pairs = tokens.iter().zip(&mut caches);
        let mut segments: Vec<_> =
            pairs.map(|(tokens, cache)| Segment { tokens, cache, logits: LogitsWanted::Last }).collect();
        let logits = trunk.forward(&mut segments, &mut recorder)?;
        tokens = logits.iter().map(|row| vec![likeliest(row)]).collect();
        recorded.push(std::mem::take(&mut recorder.pass));
    }
    // The first is that of the prompts.
    recorded.remove(0);
    Ok(recorded)
}

struct Waiting {
    experts: Arc<LocalExperts>,
    pause: Duration,
    /// In experts and pauses.
    spent: Duration,
}

impl Experts for Waiting {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let started = Instant::now();
        let output = self.experts.forward(layer, hidden, routing);
        if !self.pause.is_zero() {
            std::thread::sleep(self.pause);
        }
        self.spent += started.elapsed();
        output
    }
}

/// What decode steps of all prompts together take without their experts, if each layer pauses: the median, in milliseconds. Threads that
/// compute go to sleep meanwhile, and others use the caches.
pub(super) fn trunk_ms(
    trunk: &Trunk,
    experts: &Arc<LocalExperts>,
    prompts: &[Vec<u32>],
    passes: usize,
    pause: Duration,
) -> anyhow::Result<f64> {
    let mut waiting = Waiting { experts: experts.clone(), pause, spent: Duration::ZERO };
    let mut caches: Vec<KvCache> = prompts.iter().map(|_| trunk.new_cache()).collect();
    let mut tokens = prompts.to_vec();
    let mut times = Vec::new();
    for _ in 0..=passes {
        let pairs = tokens.iter().zip(&mut caches);
        let mut segments: Vec<_> =
            pairs.map(|(tokens, cache)| Segment { tokens, cache, logits: LogitsWanted::Last }).collect();
        waiting.spent = Duration::ZERO;
        let started = Instant::now();
        let logits = trunk.forward(&mut segments, &mut waiting)?;
        times.push((started.elapsed().saturating_sub(waiting.spent)).as_secs_f64() * 1e3);
        tokens = logits.iter().map(|row| vec![likeliest(row)]).collect();
    }
    // The first is that of the prompts.
    Ok(quantile_of(times.split_off(1), 0.5))
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> u32 {
    let best = |best: usize, (index, value): (usize, &f32)| if *value > logits[best] { index } else { best };
    logits.iter().enumerate().fold(0, best) as u32
}

/// Asks everything again, one layer after the other, and tells what each layer of each pass took.
pub(super) fn replay(experts: &mut dyn Experts, passes: &[Pass]) -> anyhow::Result<Vec<Vec<Duration>>> {
    let time = |call: &LayerCall| {
        let started = Instant::now();
        experts.forward(call.layer, &call.hidden, &call.routing).map_err(anyhow::Error::from_boxed)?;
        Ok(started.elapsed())
    };
    let mut time = time;
    passes.iter().map(|pass| pass.iter().map(&mut time).collect()).collect()
}

/// Median of the passes' sums, in milliseconds.
pub(super) fn median_ms(times: &[Vec<Duration>]) -> f64 {
    let sum = |pass: &Vec<Duration>| pass.iter().map(Duration::as_secs_f64).sum::<f64>() * 1e3;
    quantile_of(times.iter().map(sum).collect(), 0.5)
}
