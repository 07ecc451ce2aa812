//! How fast the bundled model decodes in one process: `cargo run --release -p hanse-model --example decode_speed`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hanse_model::{
    Checkpoint, LocalExperts, LogitsWanted, Sampler, SamplingParams, Segment, Tokenizer, Trunk, compute_pool,
};

const TOKENS: usize = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1);
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-moe");
    let dir = folder.as_ref().map_or(bundled.as_path(), Path::new);
    let checkpoint = Checkpoint::open(dir)?;
    let prompt = Tokenizer::load(dir)?.encode("Once upon a time, there was a little fox named Pip.", true)?;
    println!("threads  prefill ms  decode tokens/s");
    for threads in [1, 2] {
        let pool = Arc::new(compute_pool(threads)?);
        let trunk = Trunk::load(&checkpoint, pool.clone())?;
        let mut experts = LocalExperts::load(&checkpoint, pool)?;
        let mut sampler = Sampler::new(SamplingParams::greedy())?;
        let mut cache = trunk.new_cache();
        let mut step = |tokens: &[u32]| {
            let mut segments = [Segment { tokens, cache: &mut cache, logits: LogitsWanted::Last }];
            trunk.forward(&mut segments, &mut experts).map(|logits| sampler.sample(&logits[0]))
        };
        let start = Instant::now();
        let mut token = step(&prompt)?;
        let prefill = start.elapsed();
        let start = Instant::now();
        for _ in 0..TOKENS {
            token = step(&[token])?;
        }
        let rate = TOKENS as f64 / start.elapsed().as_secs_f64();
        println!("{threads:7} {:11.2} {rate:16.1}", prefill.as_secs_f64() * 1e3);
    }
    Ok(())
}
