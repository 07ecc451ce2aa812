//! A network of real volunteer processes on this machine, for the demo and for measuring.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hanse_protocol::{Multiaddr, PeerId};
use hanse_router::ExpertLayout;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

/// How long a volunteer may take to load and announce its experts.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a volunteer may take to leave before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// One volunteer process.
pub(crate) struct Process {
    pub(crate) peer_id: PeerId,
    pub(crate) experts: usize,
    pub(crate) addresses: Vec<Multiaddr>,
    child: Child,
    /// The volunteer leaves when this closes: also when this process is killed and can do nothing any more.
    stdin: Option<ChildStdin>,
}

/// The line that a node prints when it is ready.
#[derive(Deserialize)]
struct Ready {
    peer_id: String,
    addresses: Vec<Multiaddr>,
    experts: usize,
}

/// Volunteers on loopback, each a process of its own with its own identity and ports. None outlives this value.
pub(crate) struct Testnet {
    pub(crate) processes: Vec<Process>,
    /// The volunteers' identities; removed with the network.
    _data: tempfile::TempDir,
}

/// `--experts` specs for `nodes` volunteers such that every expert has `replicas` hosts and, unless `replicas` equals
/// `nodes`, no volunteer has a whole layer. Each gets contiguous runs of experts, so that a token meets few of them.
pub(crate) fn split(layout: &ExpertLayout, nodes: usize, replicas: usize) -> Vec<String> {
    let mut specs = vec![Vec::new(); nodes];
    for (&layer, &experts) in &layout.layers {
        let bounds = |part: usize| (experts as usize * part / nodes, experts as usize * (part + 1) / nodes);
        for part in 0..nodes {
            let (first, end) = bounds(part);
            if first == end {
                continue;
            }
            for replica in 0..replicas {
                specs[(part + replica) % nodes].push(format!("{layer}:{first}-{}", end - 1));
            }
        }
    }
    specs.into_iter().map(|spec| spec.join(",")).collect()
}

impl Testnet {
    /// Starts one volunteer per spec; all but the first join through the first. `started` is told after each how many run.
    pub(crate) async fn start(model: &Path, specs: &[String], started: impl Fn(usize)) -> anyhow::Result<Self> {
        let data = tempfile::tempdir().context("cannot make a folder for the volunteers")?;
        let mut net = Self { processes: Vec::new(), _data: data };
        let (first, others) = specs.split_first().context("a network needs at least one volunteer")?;
        net.processes.push(net.start_one(model, first, 0, None).await?);
        started(1);
        let bootstrap = net.bootstrap()?.clone();
        let starting = others.iter().enumerate().map(|(i, spec)| net.start_one(model, spec, i + 1, Some(&bootstrap)));
        let more = futures::future::try_join_all(starting).await?;
        net.processes.extend(more);
        started(net.processes.len());
        Ok(net)
    }

    /// The address that others join through.
    pub(crate) fn bootstrap(&self) -> anyhow::Result<&Multiaddr> {
        self.processes.first().and_then(|first| first.addresses.first()).context("the first volunteer has no address")
    }

    async fn start_one(
        &self,
        model: &Path,
        experts: &str,
        index: usize,
        bootstrap: Option<&Multiaddr>,
    ) -> anyhow::Result<Process> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
        command.arg("node").arg("--model").arg(model).args(["--experts", experts]);
        command.args(["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--threads", "1", "--json", "--until-stdin-closes"]);
        command.arg("--data-dir").arg(self._data.path().join(index.to_string()));
        if let Some(address) = bootstrap {
            command.arg("--bootstrap").arg(address.to_string());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        // Ctrl-C is for this process, which then ends the volunteers itself.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn().context("cannot start a volunteer")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("the volunteer has no output")?;
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout);
        let reading = stdout.read_line(&mut line);
        tokio::time::timeout(START_TIMEOUT, reading)
            .await
            .with_context(|| format!("volunteer {index} was not ready within {START_TIMEOUT:?}"))??;
        if line.is_empty() {
            let output = child.wait_with_output().await?;
            bail!("volunteer {index} did not start: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        // A pipe that nobody reads would stop a volunteer that logs much.
        if let Some(mut stderr) = child.stderr.take() {
            tokio::spawn(async move { tokio::io::copy(&mut stderr, &mut tokio::io::stderr()).await });
        }
        let ready: Ready = serde_json::from_str(&line).context("the volunteer's ready line is not as expected")?;
        let peer_id = ready.peer_id.parse().context("the volunteer's peer id is not one")?;
        Ok(Process { peer_id, experts: ready.experts, addresses: ready.addresses, child, stdin })
    }

    /// Ends every volunteer politely, and by force if it does not go.
    pub(crate) async fn stop(mut self) {
        for process in &mut self.processes {
            process.stdin = None;
        }
        for process in &mut self.processes {
            if tokio::time::timeout(STOP_TIMEOUT, process.child.wait()).await.is_err() {
                // It may have ended in this very moment.
                let _ = process.child.kill().await;
            }
        }
    }
}

impl Process {
    /// Kills the volunteer at once (SIGKILL), as a crash or a power cut would.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot kill a volunteer")
    }

    /// Whether the process still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The operating system's process number, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expert_has_its_replicas_and_nobody_has_a_whole_layer() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 16), (2, 16)].into() };
        let specs = split(&layout, 4, 2);
        assert_eq!(specs[0], "0:0-3,0:12-15,2:0-3,2:12-15");
        for spec in &specs {
            let experts: hanse_node::ExpertsSpec = spec.parse().unwrap();
            assert_eq!(experts.resolve(&layout, 3).unwrap().len(), 16, "half of 32");
        }
    }

    #[test]
    fn a_layer_with_fewer_experts_than_nodes_is_still_covered() {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 2)].into() };
        let specs = split(&layout, 3, 1);
        assert_eq!(specs.iter().filter(|spec| !spec.is_empty()).count(), 2);
    }
}
