//! One volunteer process: started, stopped, and made to suffer by signals.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hanse_protocol::{Multiaddr, PeerId};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long a volunteer may take to load and announce its experts.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a volunteer may take to leave before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// A slowed volunteer runs for a part of each such period.
const SLOW_PERIOD: Duration = Duration::from_millis(40);
/// What a volunteer listens on at first.
const ANY_LOOPBACK: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

/// Why the network on this machine is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestnetError {
    /// There is nothing to start.
    #[error("a network needs at least one volunteer")]
    Empty,
    /// The model has too few experts for so many volunteers. Start fewer, or more replicas.
    #[error("nothing is left for volunteer {index}: the model has too few experts for so many volunteers")]
    NothingToHost {
        /// Which volunteer.
        index: usize,
    },
    /// The volunteers' identities have no place.
    #[error("cannot make a folder for the volunteers: {0}")]
    Folder(std::io::Error),
    /// A shaper has no socket.
    #[error("cannot open a socket for a shaper: {0}")]
    Shaper(std::io::Error),
    /// The program cannot be run.
    #[error("cannot start volunteer {index}")]
    Spawn {
        /// Which volunteer.
        index: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// The program runs but was not ready in time. Loading may be slow; try again.
    #[error("volunteer {index} was not ready within {START_TIMEOUT:?}")]
    NotReady {
        /// Which volunteer.
        index: usize,
    },
    /// The program ended before it was ready.
    #[error("volunteer {index} did not start: {stderr}")]
    Ended {
        /// Which volunteer.
        index: usize,
        /// What it wrote on standard error.
        stderr: String,
    },
    /// The program's first line is not that of this version of `hanse node`.
    #[error("volunteer {index} wrote a ready line that is not as expected: {reason}")]
    Ready {
        /// Which volunteer.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The number is too large.
    #[error("there is no volunteer {index}: they are numbered from 0, and there are {nodes}")]
    NoSuchNode {
        /// The number asked for.
        index: usize,
        /// How many there are.
        nodes: usize,
    },
    /// It was killed or has ended. Restart it first.
    #[error("volunteer {index} does not run")]
    NotRunning {
        /// Which volunteer.
        index: usize,
    },
    /// It did not do as its owner asked.
    #[error("volunteer {index} does not listen to its owner: {reason}")]
    Owner {
        /// Which volunteer.
        index: usize,
        /// What went wrong.
        reason: String,
    },
    /// The system did not deliver a signal.
    #[error("cannot signal volunteer {index}")]
    Signal {
        /// Which volunteer.
        index: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// There is no shaper to change.
    #[error("this network was started without shapers")]
    NoShaper,
}

/// How a volunteer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// At full speed.
    Running,
    /// Stopped in its tracks: alive, but it answers nothing.
    Paused,
    /// It gets a part of the time only.
    Slowed,
    /// It does not run.
    Killed,
}

/// What a volunteer is started with.
pub(super) struct Launch<'a> {
    pub(super) index: usize,
    pub(super) program: &'a Path,
    pub(super) model: &'a Path,
    pub(super) spec: &'a str,
    pub(super) data_dir: &'a Path,
    /// Control-plane and data-plane addresses to listen on; free ports if `None`.
    pub(super) addresses: Option<(&'a Multiaddr, SocketAddr)>,
    /// Where others find the data plane, if not there.
    pub(super) advertise: Option<SocketAddr>,
    pub(super) bootstrap: &'a [Multiaddr],
}

/// What a volunteer says when it is ready.
pub(super) struct Ready {
    pub(super) peer_id: PeerId,
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) data_listen: SocketAddr,
    pub(super) experts: usize,
}

/// The line that a node prints when it is ready.
#[derive(Deserialize)]
struct ReadyLine {
    peer_id: String,
    addresses: Vec<Multiaddr>,
    data_listen: SocketAddr,
    experts: usize,
}

/// One volunteer process; killed when dropped, also if it is paused.
#[derive(Debug)]
pub(super) struct Process {
    index: usize,
    child: Child,
    /// The volunteer leaves when this closes: also when this process is killed and can do nothing any more.
    stdin: Option<ChildStdin>,
    state: State,
    slowing: Option<(CancellationToken, JoinHandle<()>)>,
}

/// Starts a volunteer and waits until it is ready.
pub(super) async fn launch(launch: Launch<'_>) -> Result<(Process, Ready), TestnetError> {
    let index = launch.index;
    let mut command = Command::new(launch.program);
    command.arg("node").arg("--model").arg(launch.model).args(["--experts", launch.spec]);
    // Many processes on one card would only be in each other's way.
    command
        .args(["--device", "cpu", "--threads", "1", "--json", "--until-stdin-closes"])
        .arg("--data-dir")
        .arg(launch.data_dir);
    match launch.addresses {
        Some((control, data)) => {
            let control: Multiaddr = control.iter().filter(|part| !is_peer_id(part)).collect();
            command.args(["--listen", &control.to_string(), "--data-listen", &data.to_string()]);
        }
        None => {
            command.args(["--listen", ANY_LOOPBACK]);
        }
    }
    if let Some(address) = launch.advertise {
        command.args(["--advertise", &address.to_string()]);
    }
    for address in launch.bootstrap {
        command.args(["--bootstrap", &address.to_string()]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // Ctrl-C is for this process, which then ends the volunteers itself.
    #[cfg(unix)]
    command.process_group(0);
    let mut child = command.spawn().map_err(|source| TestnetError::Spawn { index, source })?;
    let stdin = child.stdin.take();
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = BufReader::new(stdout);
        let reading = tokio::time::timeout(START_TIMEOUT, stdout.read_line(&mut line));
        let read = reading.await.map_err(|_| TestnetError::NotReady { index })?;
        read.map_err(|e| TestnetError::Ready { index, reason: e.to_string() })?;
    }
    if line.is_empty() {
        let output = child.wait_with_output().await.map_err(|source| TestnetError::Spawn { index, source })?;
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(TestnetError::Ended { index, stderr });
    }
    // A pipe that nobody reads would stop a volunteer that logs much.
    if let Some(mut stderr) = child.stderr.take() {
        tokio::spawn(async move { tokio::io::copy(&mut stderr, &mut tokio::io::stderr()).await });
    }
    let bad = |reason: String| TestnetError::Ready { index, reason };
    let ready: ReadyLine = serde_json::from_str(&line).map_err(|e| bad(e.to_string()))?;
    let peer_id = ready.peer_id.parse().map_err(|_| bad(format!("{} is no peer id", ready.peer_id)))?;
    let ReadyLine { addresses, data_listen, experts, .. } = ready;
    let process = Process { index, child, stdin, state: State::Running, slowing: None };
    Ok((process, Ready { peer_id, addresses, data_listen, experts }))
}

fn is_peer_id(part: &hanse_protocol::multiaddr::Protocol<'_>) -> bool {
    matches!(part, hanse_protocol::multiaddr::Protocol::P2p(_))
}

impl Process {
    pub(super) fn state(&self) -> State {
        self.state
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub(super) async fn kill(mut self) -> Result<(), TestnetError> {
        self.stop_slowing().await;
        self.child.kill().await.map_err(|source| TestnetError::Signal { index: self.index, source })
    }

    pub(super) async fn pause(&mut self) -> Result<(), TestnetError> {
        self.stop_slowing().await;
        self.signal(Signal::Stop)?;
        self.state = State::Paused;
        Ok(())
    }

    pub(super) async fn resume(&mut self) -> Result<(), TestnetError> {
        self.stop_slowing().await;
        self.signal(Signal::Continue)?;
        self.state = State::Running;
        Ok(())
    }

    pub(super) async fn slow(&mut self, times: u32) -> Result<(), TestnetError> {
        self.resume().await?;
        let Some(pid) = self.child.id() else { return Err(TestnetError::NotRunning { index: self.index }) };
        let running = SLOW_PERIOD / times.max(1);
        let cancel = CancellationToken::new();
        let cancelled = cancel.clone();
        let task = tokio::spawn(async move {
            // The process is not waited for while this runs, so that its number cannot become another's.
            while !cancelled.is_cancelled() && send(pid, Signal::Continue).is_ok() {
                tokio::time::sleep(running).await;
                if cancelled.is_cancelled() || send(pid, Signal::Stop).is_err() {
                    return;
                }
                tokio::time::sleep(SLOW_PERIOD - running).await;
            }
        });
        self.slowing = Some((cancel, task));
        self.state = State::Slowed;
        Ok(())
    }

    async fn stop_slowing(&mut self) {
        if let Some((cancel, task)) = self.slowing.take() {
            cancel.cancel();
            // Only a panic could make it fail, and then it sends no signals either.
            let _ = task.await;
        }
    }

    /// Ends it politely, and by force if it does not go.
    pub(super) async fn stop(mut self) {
        self.stop_slowing().await;
        // One that is paused hears nothing.
        let _ = self.signal(Signal::Continue);
        self.stdin = None;
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            // It may have ended in this very moment.
            let _ = self.child.kill().await;
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), TestnetError> {
        let index = self.index;
        let pid = self.child.id().ok_or(TestnetError::NotRunning { index })?;
        send(pid, signal).map_err(|source| TestnetError::Signal { index, source })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some((cancel, _)) = &self.slowing {
            cancel.cancel();
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Signal {
    Stop,
    Continue,
}

#[cfg(unix)]
fn send(pid: u32, signal: Signal) -> std::io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let signal = match signal {
        Signal::Stop => rustix::process::Signal::STOP,
        Signal::Continue => rustix::process::Signal::CONT,
    };
    Ok(rustix::process::kill_process(pid.ok_or(std::io::ErrorKind::InvalidInput)?, signal)?)
}

#[cfg(not(unix))]
fn send(_: u32, _: Signal) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Has this process killed when the one that started it ends, where the system can do that: a volunteer that is paused cannot see
/// its standard input close.
pub fn die_with_parent() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)) {
        tracing::debug!(%error, "this process may outlive the one that started it if it is paused then");
    }
}
