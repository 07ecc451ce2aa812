//! Peak resident sets of a client and of the volunteers, beside what they hold.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_model::Checkpoint;
use hanse_node::testnet::Testnet;
use hanse_router::ExpertLayout;
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::output::{self, say};

#[derive(Serialize)]
pub(super) struct Report {
    checkpoint_bytes: u64,
    trunk_bytes: u64,
    /// Peak resident set of a process that generated over the network.
    client_rss_bytes: u64,
    nodes: Vec<NodeMemory>,
}

#[derive(Serialize)]
struct NodeMemory {
    expert_bytes: u64,
    rss_bytes: u64,
}

/// Volunteers that have not computed yet have not read their experts: comes after the other parts.
pub(super) async fn run(
    args: &BenchArgs,
    dir: &Path,
    checkpoint: &Checkpoint,
    layout: &ExpertLayout,
    net: &Testnet,
) -> anyhow::Result<Report> {
    let bootstrap = net.bootstrap().context("no volunteer has an address")?;
    let client_rss_bytes = client_memory(args, dir, &bootstrap.to_string()).await?;
    let sizes = checkpoint.sizes();
    let mut nodes = Vec::new();
    for node in net.nodes() {
        let experts = node.spec().parse::<hanse_node::ExpertsSpec>()?;
        let experts = experts.resolve(layout, checkpoint.spec().layers.len() as u32)?;
        let expert_bytes = experts.iter().map(|(layer, _)| sizes.bytes_per_expert[*layer as usize]).sum();
        let pid = node.pid().context("a volunteer ended")?;
        let rss_bytes = resident(pid, "VmHWM:").context("cannot read a volunteer's memory")?;
        nodes.push(NodeMemory { expert_bytes, rss_bytes });
    }
    Ok(Report {
        checkpoint_bytes: sizes.trunk_bytes + sizes.expert_bytes,
        trunk_bytes: sizes.trunk_bytes,
        client_rss_bytes,
        nodes,
    })
}

/// Peak resident set of `hanse generate` on this network, in bytes.
async fn client_memory(args: &BenchArgs, dir: &Path, bootstrap: &str) -> anyhow::Result<u64> {
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.arg("generate").arg("--model").arg(dir).args(["--bootstrap", bootstrap, "--ignore-eos", "--json"]);
    command.args(["--prompt-ids", "1,2,3", "--wire", &args.wire.to_string()]);
    command.args(["--max-tokens", &args.max_tokens.to_string()]);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().context("cannot start a client")?;
    let pid = child.id().context("the client ended at once")?;
    let mut peak = 0;
    loop {
        peak = peak.max(resident(pid, "VmHWM:").unwrap_or(0));
        tokio::select! {
            status = child.wait() => {
                if !status?.success() {
                    bail!("a client that generated over the network failed");
                }
                return Ok(peak);
            }
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
}

/// A line of `/proc/PID/status` that is given in kB, in bytes; `None` where there is no such file.
pub(super) fn resident(pid: u32, line: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|l| l.strip_prefix(line))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let (checkpoint, trunk) = (output::bytes(self.checkpoint_bytes), output::bytes(self.trunk_bytes));
        say!("memory     checkpoint {checkpoint}, trunk {trunk}");
        say!("           client {} at most", output::bytes(self.client_rss_bytes));
        for node in &self.nodes {
            let (rss, experts) = (output::bytes(node.rss_bytes), output::bytes(node.expert_bytes));
            say!("           node {rss} at most, experts {experts}");
        }
        Ok(())
    }
}
