//! Memory of a client against what it keeps of contexts, and of volunteers against what they host.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_node::testnet::{Testnet, split};
use hanse_protocol::WireDtype;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::Measured;
use super::curve::{Axis, Curve, Rounds};
use super::net::{Net, PROMPT, Setup, decode};
use super::spread::PEERS;
use crate::commands::bench::memory::resident;

const MIB: f64 = 1024.0 * 1024.0;
/// Prompts of one request to the gateway, and of how many tokens at most.
const PROMPTS: usize = 8;
const PROMPT_TOKENS: usize = 500;
const REQUESTS: usize = 9;
/// How long one of them may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut nodes = Vec::new();
    let mut client = Rounds::default();
    for peers in PEERS {
        let net = Net::start(setup, split(&setup.layout, peers, 1), WireDtype::F32).await?;
        decode(&net.client, vec![setup.prompt(0, PROMPT)], setup.max_tokens).await?;
        for node in net.testnet.nodes() {
            let pid = node.pid().context("a volunteer ended")?;
            let peak = resident(pid, "VmHWM:").context("cannot read a volunteer's memory")?;
            let number = node.index();
            let experts = net.hosts.get(number).context("a volunteer too many")?;
            nodes.push((experts.iter().map(|(layer, _)| expert_bytes(setup, *layer)).sum::<u64>(), peak));
        }
        if peers == PEERS[0] {
            setup.bar.set_message("weighing a client");
            client = weigh_client(setup, &net.testnet).await?;
        }
        net.stop().await;
    }
    let (least, peak) = nodes.iter().min().copied().context("no volunteer")?;
    let base = peak.saturating_sub(least);
    let mut hosted = Rounds::default();
    for (experts, peak) in nodes {
        hosted.add(experts as f64 / MIB, peak as f64 / MIB, (base + experts) as f64 / MIB);
    }
    let curves = vec![
        Curve {
            name: "memory-client",
            title: "Memory of a client and contexts",
            x: Axis::linear("thousand tokens whose keys and values are kept"),
            y: Axis::linear("resident set, MiB"),
            series: vec![client.series("")],
        },
        Curve {
            name: "memory-node",
            title: "Memory of a volunteer and experts",
            x: Axis::linear("experts hosted, MiB"),
            y: Axis::linear("largest resident set, MiB"),
            series: vec![hosted.series("")],
        },
    ];
    Ok(Measured { curves, notes: Vec::new(), goals: Vec::new() })
}

fn expert_bytes(setup: &Setup, layer: u32) -> u64 {
    setup.checkpoint.sizes().bytes_per_expert.get(layer as usize).copied().unwrap_or(0)
}

/// The resident set of a gateway, which keeps the keys and values of what it has answered, request by request. The first request gives the
/// base: trunk, buffers and all that does not grow.
async fn weigh_client(setup: &Setup, testnet: &Testnet) -> anyhow::Result<Rounds> {
    let bootstrap = testnet.bootstrap().context("no volunteer has an address")?.to_string();
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("gateway").arg("--model").arg(&setup.dir).args(["--bootstrap", &bootstrap, "--json"]);
    command.args(["--name", "m", "--listen", "127.0.0.1:0"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut gateway = command.spawn().context("cannot start a gateway")?;
    let address = ready(&mut gateway).await?;
    let pid = gateway.id().context("the gateway ended")?;
    let tokens = PROMPT_TOKENS.min(setup.context() - 2);
    let position: usize = setup.position_bytes();
    let mut base = None;
    let mut weighed = Rounds::default();
    for request in 0..REQUESTS {
        let prompts: Vec<_> = (0..PROMPTS).map(|i| setup.prompt(request * PROMPTS + i, tokens)).collect();
        ask(&address, &prompts).await?;
        let kept = ((request + 1) * PROMPTS * tokens) as f64;
        let bytes = resident(pid, "VmRSS:").context("cannot read the gateway's memory")? as f64;
        let cached = kept * position as f64;
        match base {
            None => base = Some(bytes - cached),
            Some(base) => weighed.add(kept / 1e3, bytes / MIB, (base + cached) / MIB),
        }
    }
    gateway.kill().await?;
    Ok(weighed)
}

#[derive(Deserialize)]
struct Ready {
    url: String,
}

/// Where a gateway that was just started serves.
async fn ready(gateway: &mut Child) -> anyhow::Result<String> {
    let stdout = gateway.stdout.take().context("the gateway says nothing")?;
    let mut line = String::new();
    tokio::time::timeout(PATIENCE, BufReader::new(stdout).read_line(&mut line)).await??;
    let ready: Ready = serde_json::from_str(&line).context("the gateway did not start")?;
    Ok(ready.url.trim_start_matches("http://").to_owned())
}

/// Has the gateway answer prompts of token ids with a token each.
async fn ask(address: &str, prompts: &[Vec<u32>]) -> anyhow::Result<()> {
    let body = serde_json::json!({ "model": "m", "prompt": prompts, "max_tokens": 1 }).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await??;
    if !answer.starts_with("HTTP/1.1 200") {
        bail!("a gateway refused prompts: {answer}");
    }
    Ok(())
}
