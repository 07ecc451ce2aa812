//! Orders to a network that runs in the foreground of another process: one JSON line each way over a unix socket that only its
//! owner can open.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Counts, Shape, State, Testnet, TestnetError};

/// The longest order or answer, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// How long a process that connected may take to say what it wants.
const ORDER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an order may take: starting volunteers again takes longest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);
/// The socket's name in the state folder.
const SOCKET: &str = "control.sock";

/// What can be asked of a running network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Order {
    /// Tell how everything is.
    Status,
    /// Kill a volunteer.
    Kill {
        /// Which one, from 0.
        node: usize,
    },
    /// Stop a volunteer in its tracks.
    Pause {
        /// Which one, from 0.
        node: usize,
    },
    /// Let a paused or slowed volunteer go on.
    Resume {
        /// Which one, from 0.
        node: usize,
    },
    /// Start a volunteer again.
    Restart {
        /// Which one, from 0.
        node: usize,
    },
    /// Have a volunteer run one part in `times` of the time.
    Slow {
        /// Which one, from 0.
        node: usize,
        /// How many times slower.
        times: u32,
    },
    /// Cut the path to a volunteer's data plane one way or both.
    Cut {
        /// Which one, from 0.
        node: usize,
        /// Nothing comes through to it.
        to: bool,
        /// Nothing comes through from it.
        from: bool,
    },
    /// Undo all trouble.
    Heal,
    /// End the network.
    Down,
}

/// Why an order was not given, or not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nothing listens there: start a network first, or name its folder.
    #[error("no testnet runs in {}: start one with `hanse testnet up`, or name its folder with --state", .0.display())]
    NotUp(PathBuf),
    /// There is one already.
    #[error("a testnet runs in {} already: end it with `hanse testnet down`, or name another folder with --state", .0.display())]
    AlreadyUp(PathBuf),
    /// The folder is somebody else's, or others may write to it.
    #[error("{} is not a folder of this user alone: name another one with --state", .0.display())]
    NotOurs(PathBuf),
    /// The socket cannot be made or used.
    #[error("cannot use {}: {source}", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The network answered something that is not understood: another version?
    #[error("the testnet's answer is not as expected: {0}")]
    Answer(String),
    /// The network says why it did not do it.
    #[error("{0}")]
    Refused(String),
}

/// How a network is.
#[derive(Debug, Clone, Serialize)]
pub struct StatusDocument {
    /// An address that others can join through; null if no volunteer runs.
    pub bootstrap: Option<String>,
    /// The volunteers.
    pub nodes: Vec<NodeStatus>,
}

/// How a volunteer is.
#[derive(Debug, Clone, Serialize)]
pub struct NodeStatus {
    /// Its number.
    pub node: usize,
    /// How it is.
    pub state: State,
    /// Its peer id.
    pub peer_id: String,
    /// Its process, if it runs.
    pub pid: Option<u32>,
    /// How many experts it hosts.
    pub experts: usize,
    /// Its control-plane addresses.
    pub addresses: Vec<String>,
    /// Where its data plane is reached.
    pub data_address: String,
    /// The path to it and what became of the packets.
    pub to: Option<PathStatus>,
    /// The path from it.
    pub from: Option<PathStatus>,
}

/// How a path is.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PathStatus {
    /// What is done to packets.
    #[serde(flatten)]
    pub shape: Shape,
    /// What became of them.
    pub packets: Counts,
}

/// How the network is now.
pub fn status(net: &mut Testnet) -> StatusDocument {
    let bootstrap = net.bootstrap().map(ToString::to_string);
    let status = |node: &mut super::Node| {
        let alive = node.is_alive();
        let (mut to, mut from) = (None, None);
        if let Some(shaper) = node.shaper() {
            let (shapes, counts) = (shaper.shapes(), shaper.counts());
            to = Some(PathStatus { shape: shapes.0, packets: counts.0 });
            from = Some(PathStatus { shape: shapes.1, packets: counts.1 });
        }
        NodeStatus {
            node: node.index(),
            state: if alive { node.state() } else { State::Killed },
            peer_id: node.peer_id().to_string(),
            pid: node.pid().filter(|_| alive),
            experts: node.experts(),
            addresses: node.addresses().iter().map(ToString::to_string).collect(),
            data_address: node.data_address().to_string(),
            to,
            from,
        }
    };
    StatusDocument { bootstrap, nodes: net.nodes_mut().iter_mut().map(status).collect() }
}

/// Does what is ordered, except ending the network, which is its owner's.
///
/// # Errors
/// See [`TestnetError`].
pub async fn obey(net: &mut Testnet, order: &Order) -> Result<(), TestnetError> {
    match *order {
        Order::Status | Order::Down => Ok(()),
        Order::Kill { node } => net.kill(node).await,
        Order::Pause { node } => net.pause(node).await,
        Order::Resume { node } => net.resume(node).await,
        Order::Restart { node } => net.restart(node).await,
        Order::Slow { node, times } => net.slow(node, times).await,
        Order::Cut { node, to, from } => net.cut(node, to, from),
        Order::Heal => net.heal().await,
    }
}

/// The place where a network takes orders; removed when dropped.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    listener: UnixListener,
}

/// One order and the process that waits for its answer.
#[derive(Debug)]
pub struct Asked {
    /// What is wanted.
    pub order: Order,
    stream: UnixStream,
}

impl Control {
    /// Opens the socket in `state`, which is made if it is not there, for this user alone.
    ///
    /// # Errors
    /// Another network runs there, the folder is not this user's alone, or it cannot be used.
    pub async fn open(state: &Path) -> Result<Self, ControlError> {
        let path = state.join(SOCKET);
        let failed = |source| ControlError::Socket { path: path.clone(), source };
        match std::fs::DirBuilder::new().mode(0o700).create(state) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        check_ours(state)?;
        if UnixStream::connect(&path).await.is_ok() {
            return Err(ControlError::AlreadyUp(state.to_owned()));
        }
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        // Nobody else can come into the folder in the meantime.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { path, listener })
    }

    /// The next order. One that is not understood is answered here.
    pub async fn next(&self) -> io::Result<Asked> {
        loop {
            let (mut stream, _) = self.listener.accept().await?;
            let read = tokio::time::timeout(ORDER_TIMEOUT, read_line(&mut stream)).await;
            let Ok(Ok(line)) = read else { continue };
            match serde_json::from_str(&line) {
                Ok(order) => return Ok(Asked { order, stream }),
                // Whoever does not read the answer does not get it.
                Err(error) => drop(answer(&mut stream, &Answer::Error(format!("no such order: {error}"))).await),
            }
        }
    }
}

impl Asked {
    /// Tells what came of it.
    pub async fn reply(mut self, outcome: Result<serde_json::Value, String>) {
        let outcome = match outcome {
            Ok(document) => Answer::Done(document),
            Err(reason) => Answer::Error(reason),
        };
        // A process that has gone does not want to know any more.
        let _ = answer(&mut self.stream, &outcome).await;
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // If it cannot be removed, the next network finds that nobody listens there.
        let _ = std::fs::remove_file(&self.path);
        if let Some(folder) = self.path.parent() {
            // Only if it is empty.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Gives an order to the network whose folder is `state` and waits until it is done.
///
/// # Errors
/// See [`ControlError`].
pub async fn give(state: &Path, order: &Order) -> Result<serde_json::Value, ControlError> {
    let path = state.join(SOCKET);
    let mut stream = UnixStream::connect(&path).await.map_err(|_| ControlError::NotUp(state.to_owned()))?;
    check_ours(state)?;
    let failed = |source| ControlError::Socket { path: path.clone(), source };
    let mut line = serde_json::to_string(order).map_err(|e| ControlError::Answer(e.to_string()))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).await.map_err(failed)?;
    let read = tokio::time::timeout(ANSWER_TIMEOUT, read_line(&mut stream)).await;
    let line = read.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
    match serde_json::from_str(&line).map_err(|e| ControlError::Answer(e.to_string()))? {
        Answer::Done(document) => Ok(document),
        Answer::Error(reason) => Err(ControlError::Refused(reason)),
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Done(serde_json::Value),
    Error(String),
}

async fn answer(stream: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    tokio::time::timeout(ORDER_TIMEOUT, stream.write_all(&line)).await?
}

async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line).await?;
    if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Somebody else's network must not be obeyed nor ordered about.
fn check_ours(state: &Path) -> Result<(), ControlError> {
    let failed = |source| ControlError::Socket { path: state.to_owned(), source };
    let metadata = std::fs::symlink_metadata(state).map_err(failed)?;
    let ours = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
    if ours && metadata.mode() & 0o022 == 0 { Ok(()) } else { Err(ControlError::NotOurs(state.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_order_is_heard_and_answered() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let control = Control::open(&state).await.unwrap();
        assert_eq!(std::fs::metadata(state.join(SOCKET)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        let order = Order::Cut { node: 3, to: true, from: false };
        let served = async {
            let asked = control.next().await.unwrap();
            assert_eq!(asked.order, order);
            asked.reply(Ok(serde_json::json!({"fine": true}))).await;
            control.next().await.unwrap().reply(Err("no".into())).await;
        };
        let asked = async {
            assert_eq!(give(&state, &order).await.unwrap()["fine"], true);
            assert!(matches!(give(&state, &Order::Heal).await, Err(ControlError::Refused(reason)) if reason == "no"));
        };
        tokio::join!(served, asked);
        drop(control);
        assert!(!state.exists(), "nothing is left");
        assert!(matches!(give(&state, &Order::Status).await, Err(ControlError::NotUp(_))));
    }

    #[tokio::test]
    async fn a_folder_serves_one_network_and_a_stale_socket_is_no_network() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let first = Control::open(&state).await.unwrap();
        assert!(matches!(Control::open(&state).await, Err(ControlError::AlreadyUp(_))));
        drop(first);
        std::fs::create_dir(&state).unwrap();
        drop(std::os::unix::net::UnixListener::bind(state.join(SOCKET)).unwrap());
        assert!(Control::open(&state).await.is_ok());
    }

    #[tokio::test]
    async fn a_folder_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Control::open(&state).await, Err(ControlError::NotOurs(_))));
    }
}
