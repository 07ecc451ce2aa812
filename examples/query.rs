//! Generates over a network: the shortest useful program against `hanse-router`.
//!
//! Start a volunteer (`cargo run --release -- node --model examples/models/tiny-moe`), then, with an address it prints:
//!
//! ```text
//! cargo run --release -p hanse-examples --bin query -- examples/models/tiny-moe ADDRESS "Once upon a time"
//! ```

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use futures::StreamExt;
use hanse_model::Checkpoint;
use hanse_protocol::Identity;
use hanse_router::{Client, GenerateRequest, ModelConfig, NetworkConfig};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().context("usage: query MODEL_DIR BOOTSTRAP_ADDRESS PROMPT");
    let (dir, bootstrap, prompt) = (PathBuf::from(next()?), next()?.parse()?, next()?);

    // The model's id is a hash over its weights: peers that host anything else are never called.
    let model = hanse_router::weights::model_id(&Checkpoint::open(&dir)?)?;

    // One address is enough: the DHT knows who hosts which experts. This process keeps the rest of the model, the trunk.
    let network = NetworkConfig { bootstrap: vec![bootstrap], ..NetworkConfig::default() };
    let client = Client::connect(&ModelConfig { dir, threads: 0 }, model, &Identity::generate(), network).await?;

    // The text never leaves this process: volunteers see hidden states only.
    let prompt = client.tokenizer().context("the model has no tokenizer")?.encode(&prompt, true)?;
    let mut tokens = client.generate(GenerateRequest::greedy(prompt, 64));
    while let Some(token) = tokens.next().await {
        print!("{}", token?.text);
        std::io::stdout().flush()?;
    }
    let summary = tokens.summary().context("no summary")?;
    println!("{}", summary.rest);
    eprintln!("{:.1} tokens/s from {} peers", summary.timings.tokens_per_second(), summary.network.peers);
    Ok(())
}
