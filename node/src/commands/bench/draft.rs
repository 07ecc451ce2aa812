//! `hanse bench --drafts`: the same generations without drafts and with them, over paths with a round trip.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_model::{Checkpoint, SamplingParams, compute_pool};
use hanse_node::testnet::{Shape, Testnet, TestnetConfig, split};
use hanse_protocol::{Identity, ModelId};
use hanse_router::client::layout_of;
use hanse_router::stats::quantile_of;
use hanse_router::{Client, EngineConfig, GenerateRequest, NetworkConfig, Resident, Summary};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::model::Folder;
use crate::output::say;
use crate::{output, paths};

/// A story of the bundled model's kind and the beginning of another one, which goes on much as the first does.
const REPEATING: &str = "One day in autumn, Max was playing with a golden hat inside. Suddenly there was a loud crash. The hat had hit his \
     grandmother's mirror, and the mirror broke into three pieces. Max was frightened. \"What now?\" he thought. \"I could hide the \
     pieces.\" Pebble, his friend the boy, looked at him. \"You will feel better if you tell the truth,\" said Pebble.\nAll through \
     supper Max could not eat. At last he went to his mother and said, \"It was me. I broke your mirror. I am very sorry.\"\nHis mother \
     was silent for a moment. Then she said, \"Thank you for telling me. A mirror can be mended.\" One day in autumn, Max was playing \
     with a golden hat inside. Suddenly there was a loud crash.";
const PROSE: &str = "Once upon a time";

/// How a client drafts: the share of the experts that it holds.
const KINDS: [(&str, bool, u64); 4] = [
    ("none", false, 0),
    ("lookup", true, 0),
    ("lookup, quarter resident", true, 25),
    ("lookup, half resident", true, 50),
];

#[derive(Serialize)]
struct Document {
    model: PathBuf,
    nodes: u16,
    max_tokens: usize,
    cases: Vec<CaseReport>,
}

/// Medians over the rounds.
#[derive(Serialize)]
struct CaseReport {
    rtt_ms: f64,
    text: &'static str,
    drafts: &'static str,
    tokens_per_second: f64,
    /// Median of the rounds' ratios to the speed without drafts.
    ratio: f64,
    drafted: u64,
    accepted: u64,
    tokens_per_step: f64,
    round_trips_per_token: f64,
    /// Sent and received, of hidden states and assignments.
    bytes_per_token: f64,
}

pub(super) async fn run(args: &BenchArgs, round_trips: &[Duration]) -> anyhow::Result<()> {
    let dir = args.model.clone().map_or_else(paths::bundled_model, Ok)?;
    let folder = Folder::open(&dir)?;
    let (checkpoint, id) = (folder.checkpoint.clone(), folder.id());
    let mut cases = Vec::new();
    for &rtt in round_trips {
        cases.extend(over_path(args, &dir, &checkpoint, id, rtt).await?);
    }
    let document = Document { model: dir, nodes: args.nodes, max_tokens: args.max_tokens, cases };
    if args.json {
        return output::json(&document);
    }
    print_report(&document)
}

/// All texts and kinds on a network of its own whose paths have one round trip.
async fn over_path(
    args: &BenchArgs,
    dir: &Path,
    checkpoint: &Checkpoint,
    id: ModelId,
    rtt: Duration,
) -> anyhow::Result<Vec<CaseReport>> {
    let bar = output::spinner("starting volunteers");
    let specs = split(&layout_of(checkpoint.spec()), usize::from(args.nodes), 1);
    let shape = (!rtt.is_zero()).then(|| Shape::path(rtt, Duration::ZERO, 0.0));
    let config = TestnetConfig { shape, ..TestnetConfig::new(std::env::current_exe()?, dir, specs) };
    let net = Testnet::start(config, |_| ()).await?;
    let bootstrap = net.bootstrap().context("no volunteer has an address")?.clone();
    let mut clients = Vec::new();
    for (_, drafts, percent) in KINDS {
        let mut network =
            NetworkConfig { bootstrap: vec![bootstrap.clone()], wire: args.wire, ..NetworkConfig::default() };
        if percent > 0 {
            let (checkpoint, pool) = (checkpoint.clone(), Arc::new(compute_pool(0)?));
            let budget = checkpoint.sizes().expert_bytes * percent / 100;
            let load = move || Resident::load(checkpoint, pool, budget);
            network.resident = Some(Arc::new(tokio::task::spawn_blocking(load).await??));
        }
        let client = Client::connect_with(checkpoint, 0, id, &Identity::generate(), network).await?;
        clients.push(client.with_engine(EngineConfig { drafts, ..EngineConfig::default() }));
    }
    let mut found: BTreeMap<(usize, usize), Vec<Run>> = BTreeMap::new();
    let texts = requests(args, clients.first().context("no client")?)?;
    for round in 0..=args.rounds.max(1) {
        for (text, (name, request)) in texts.iter().enumerate() {
            let mut expected = None;
            // In turns, so that a machine that becomes slower meanwhile slows all.
            for (kind, client) in clients.iter().enumerate() {
                bar.set_message(format!("{rtt:?}, round {round}, {name}, drafts: {}", KINDS[kind].0));
                if round == 0 && kind == 0 {
                    // Without drafts there is nothing to learn; the prompt is kept.
                    generate(client, &GenerateRequest { max_tokens: 2, ..request.clone() }).await?;
                    continue;
                }
                let run = generate(client, request).await?;
                if *expected.get_or_insert_with(|| run.tokens.clone()) != run.tokens {
                    bail!("drafts have changed the tokens of {name}: this is a defect");
                }
                // The first round warms up: connections, beginnings that are kept, what steps take.
                if round > 0 {
                    found.entry((text, kind)).or_default().push(run);
                }
            }
        }
    }
    bar.finish_and_clear();
    for client in &clients {
        client.close().await;
    }
    net.stop().await;
    let plain = |text: usize| found.get(&(text, 0)).map(Vec::as_slice).unwrap_or_default();
    let report = |(&(text, kind), runs): (&(usize, usize), &Vec<Run>)| CaseReport {
        rtt_ms: rtt.as_secs_f64() * 1e3,
        text: texts.get(text).map_or("", |(name, _)| name),
        drafts: KINDS[kind].0,
        tokens_per_second: median(runs.iter().map(Run::speed)),
        ratio: median(runs.iter().zip(plain(text)).map(|(run, plain)| run.speed() / plain.speed())),
        drafted: runs.iter().map(|run| run.summary.drafts.drafted).sum(),
        accepted: runs.iter().map(|run| run.summary.drafts.accepted).sum(),
        tokens_per_step: median(runs.iter().map(|run| run.summary.timings.tokens_per_step())),
        round_trips_per_token: median(runs.iter().map(|run| run.by_token(run.summary.drafts.decode_round_trips))),
        bytes_per_token: median(
            runs.iter().map(|run| run.by_token(run.summary.network.bytes_sent + run.summary.network.bytes_received)),
        ),
    };
    Ok(found.iter().map(report).collect())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    quantile_of(values.collect(), 0.5)
}

struct Run {
    tokens: Vec<u32>,
    summary: Summary,
}

impl Run {
    fn speed(&self) -> f64 {
        self.summary.timings.tokens_per_second()
    }

    fn by_token(&self, count: u64) -> f64 {
        count as f64 / self.summary.timings.decode_tokens.max(1) as f64
    }
}

/// What is generated: a text that repeats what its prompt says, and prose that does not, the likeliest and as it is drawn.
fn requests(args: &BenchArgs, client: &Client) -> anyhow::Result<Vec<(&'static str, GenerateRequest)>> {
    let tokenizer = client.tokenizer().context("the model folder has no tokenizer.json")?;
    let drawn =
        SamplingParams { temperature: 0.7, top_k: Some(40), top_p: Some(0.95), seed: 1, ..SamplingParams::default() };
    let texts = [
        ("text that repeats", REPEATING, SamplingParams::greedy()),
        ("free prose", PROSE, SamplingParams::greedy()),
        ("free prose, drawn", PROSE, drawn),
    ];
    let request = |(name, prompt, sampling): (&'static str, &str, SamplingParams)| {
        let prompt = tokenizer.encode(prompt, true)?;
        let request =
            GenerateRequest { sampling, ignore_eos: true, ..GenerateRequest::greedy(prompt, args.max_tokens) };
        anyhow::Ok((name, request))
    };
    texts.into_iter().map(request).collect()
}

async fn generate(client: &Client, request: &GenerateRequest) -> anyhow::Result<Run> {
    let mut generation = client.generate(request.clone());
    let mut tokens = Vec::new();
    while let Some(token) = generation.next().await {
        tokens.push(token?.id);
    }
    let summary = generation.summary().context("the generation ended without a word")?.clone();
    if summary.timings.decode_tokens == 0 {
        bail!("nothing to time: give --max-tokens 2 or more");
    }
    Ok(Run { tokens, summary })
}

fn print_report(document: &Document) -> anyhow::Result<()> {
    say!("{}, {} volunteers, {} tokens\n", document.model.display(), document.nodes, document.max_tokens);
    say!(
        "| round trip | text | drafts | tokens/s | ratio | accepted | tokens a pass | round trips a token | KiB a token |"
    );
    say!("|---|---|---|---|---|---|---|---|---|");
    for case in &document.cases {
        say!(
            "| {:.0} ms | {} | {} | {:.2} | {:.2} | {} of {} | {:.2} | {:.2} | {:.1} |",
            case.rtt_ms,
            case.text,
            case.drafts,
            case.tokens_per_second,
            case.ratio,
            case.accepted,
            case.drafted,
            case.tokens_per_step,
            case.round_trips_per_token,
            case.bytes_per_token / 1024.0
        );
    }
    Ok(())
}
