//! A network of real volunteer processes on this machine, and the means to make trouble for it: for the demo, for measuring, for
//! tests, and for people who want to see what happens.
//!
//! [`Testnet::start`] runs one process of the program `hanse` per `--experts` spec ([`split`] makes them), each with its own
//! identity, ports and threads. Volunteers can be killed, paused, slowed down and started again; a [`Shaper`] before each one's
//! data plane can make the path to it long, unsteady, lossy or one-way. None outlives the value, not even if this process is killed.
//!
//! Inside: `shape` is what happens to a packet, pure, `shaper` the sockets around it, `alarm` its clock; `process` is one volunteer; `split` gives out
//! the experts; [`chaos`] breaks things for a while and checks every token; `control` lets other processes give orders.

mod alarm;
pub mod chaos;
#[cfg(unix)]
pub mod control;
mod process;
mod shape;
mod shaper;
mod split;

use std::net::SocketAddr;
use std::path::PathBuf;

use hanse_protocol::{Multiaddr, PeerId};

use crate::owner::control::{Command, ask};
use process::{Launch, Process, launch};
pub use process::{State, TestnetError, die_with_parent};
pub use shape::{Counts, Lane, Shape};
pub use shaper::Shaper;
pub use split::{split, split_unequally, weights};

/// How many running volunteers one that starts is told of.
const BOOTSTRAPS: usize = 3;

/// What to start.
#[derive(Debug, Clone)]
pub struct TestnetConfig {
    /// The program `hanse`.
    pub program: PathBuf,
    /// The model's folder.
    pub model: PathBuf,
    /// What each volunteer hosts, as `--experts` reads it.
    pub specs: Vec<String>,
    /// The path to every volunteer's data plane in both directions; `None` for no shaper before it.
    pub shape: Option<Shape>,
    /// For the shapers' losses and delays.
    pub seed: u64,
}

impl TestnetConfig {
    /// One volunteer of `program` per spec, without shapers.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, model: impl Into<PathBuf>, specs: Vec<String>) -> Self {
        Self { program: program.into(), model: model.into(), specs, shape: None, seed: 0 }
    }
}

/// One volunteer, running or not.
#[derive(Debug)]
pub struct Node {
    index: usize,
    spec: String,
    data_dir: PathBuf,
    peer_id: PeerId,
    experts: usize,
    addresses: Vec<Multiaddr>,
    data_listen: SocketAddr,
    process: Option<Process>,
    shaper: Option<Shaper>,
}

/// Volunteers on loopback. None outlives this value.
#[derive(Debug)]
pub struct Testnet {
    config: TestnetConfig,
    nodes: Vec<Node>,
    /// The volunteers' identities; removed with the network.
    data: tempfile::TempDir,
}

impl Testnet {
    /// Starts one volunteer per spec; all but the first join through the first. `started` is told after each how many run.
    ///
    /// # Errors
    /// See [`TestnetError`]; after an error nothing is left running.
    pub async fn start(config: TestnetConfig, started: impl Fn(usize)) -> Result<Self, TestnetError> {
        let data = tempfile::tempdir().map_err(TestnetError::Folder)?;
        let mut net = Self { config, nodes: Vec::new(), data };
        let specs = net.config.specs.clone();
        if let Some(index) = specs.iter().position(String::is_empty) {
            return Err(TestnetError::NothingToHost { index });
        }
        let (first, others) = specs.split_first().ok_or(TestnetError::Empty)?;
        let first = net.first_start(0, first).await?;
        net.nodes.push(first);
        started(1);
        let starting = others.iter().enumerate().map(|(i, spec)| net.first_start(i + 1, spec));
        let more = futures::future::try_join_all(starting).await?;
        net.nodes.extend(more);
        started(net.nodes.len());
        Ok(net)
    }

    /// The volunteers, in the order of their specs.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// An address that others can join through: that of the first volunteer that runs undisturbed.
    #[must_use]
    pub fn bootstrap(&self) -> Option<&Multiaddr> {
        self.running().find_map(|node| node.addresses.first())
    }

    /// The same, to ask whether they still run.
    pub fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| matches!(node.state(), State::Running | State::Slowed))
    }

    async fn first_start(&self, index: usize, spec: &str) -> Result<Node, TestnetError> {
        let shaper = match self.config.shape {
            Some(shape) => {
                let seed = self.config.seed.wrapping_add(index as u64);
                Some(Shaper::start(shape, seed).await.map_err(TestnetError::Shaper)?)
            }
            None => None,
        };
        let data_dir = self.data.path().join(index.to_string());
        let (process, ready) = launch(Launch {
            index,
            program: &self.config.program,
            model: &self.config.model,
            spec,
            data_dir: &data_dir,
            addresses: None,
            advertise: shaper.as_ref().map(Shaper::address),
            bootstrap: &self.bootstraps(index),
        })
        .await?;
        if let Some(shaper) = &shaper {
            shaper.set_target(Some(ready.data_listen));
        }
        Ok(Node {
            index,
            spec: spec.to_owned(),
            data_dir,
            peer_id: ready.peer_id,
            experts: ready.experts,
            addresses: ready.addresses,
            data_listen: ready.data_listen,
            process: Some(process),
            shaper,
        })
    }

    /// Whom volunteer `index` joins through.
    fn bootstraps(&self, index: usize) -> Vec<Multiaddr> {
        let others = self.running().filter(|node| node.index != index);
        others.filter_map(|node| node.addresses.first().cloned()).take(BOOTSTRAPS).collect()
    }

    fn node(&mut self, index: usize) -> Result<&mut Node, TestnetError> {
        let nodes = self.nodes.len();
        self.nodes.get_mut(index).ok_or(TestnetError::NoSuchNode { index, nodes })
    }

    /// Kills a volunteer at once (SIGKILL), as a crash or a power cut would. Nothing to do for one that does not run.
    ///
    /// # Errors
    /// There is no such volunteer, or the system refuses.
    pub async fn kill(&mut self, index: usize) -> Result<(), TestnetError> {
        let node = self.node(index)?;
        if let Some(shaper) = &node.shaper {
            shaper.set_target(None);
        }
        match node.process.take() {
            Some(process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Stops a volunteer in its tracks (SIGSTOP): it keeps its connections and answers nothing.
    ///
    /// # Errors
    /// There is no such volunteer, it does not run, or the system refuses.
    pub async fn pause(&mut self, index: usize) -> Result<(), TestnetError> {
        self.process(index)?.pause().await
    }

    /// Lets a paused or slowed volunteer go on at full speed.
    ///
    /// # Errors
    /// As [`Testnet::pause`].
    pub async fn resume(&mut self, index: usize) -> Result<(), TestnetError> {
        self.process(index)?.resume().await
    }

    /// Has a volunteer take no calls until it is woken, as `hanse pause` does for its owner.
    ///
    /// # Errors
    /// There is no such volunteer, or it does not do as it is told.
    pub async fn rest(&mut self, index: usize) -> Result<(), TestnetError> {
        self.tell(index, Command::Pause).await
    }

    /// Has it take calls again, as `hanse resume` does.
    ///
    /// # Errors
    /// As [`Testnet::rest`].
    pub async fn wake(&mut self, index: usize) -> Result<(), TestnetError> {
        self.tell(index, Command::Resume).await
    }

    async fn tell(&mut self, index: usize, command: Command) -> Result<(), TestnetError> {
        let answer = ask(&self.node(index)?.data_dir, command).await;
        let answer = answer.map_err(|e| TestnetError::Owner { index, reason: e.to_string() })?;
        match answer.strip_prefix("error: ") {
            Some(reason) => Err(TestnetError::Owner { index, reason: reason.to_owned() }),
            None => Ok(()),
        }
    }

    /// Ends a volunteer politely: it withdraws its advert and finishes what is in flight. Nothing to do for one that does not run.
    ///
    /// # Errors
    /// There is no such volunteer.
    pub async fn leave(&mut self, index: usize) -> Result<(), TestnetError> {
        if let Some(process) = self.node(index)?.process.take() {
            process.stop().await;
        }
        Ok(())
    }

    /// Has a volunteer run only one part in `times` of the time, until it is resumed.
    ///
    /// # Errors
    /// As [`Testnet::pause`].
    pub async fn slow(&mut self, index: usize, times: u32) -> Result<(), TestnetError> {
        self.process(index)?.slow(times).await
    }

    fn process(&mut self, index: usize) -> Result<&mut Process, TestnetError> {
        self.node(index)?.process.as_mut().ok_or(TestnetError::NotRunning { index })
    }

    /// Starts a volunteer again with the same identity, experts and ports, after ending it if it runs.
    ///
    /// # Errors
    /// There is no such volunteer, or it does not start.
    pub async fn restart(&mut self, index: usize) -> Result<(), TestnetError> {
        self.kill(index).await?;
        let bootstrap = self.bootstraps(index);
        let Self { config, nodes, .. } = self;
        let count = nodes.len();
        let node = nodes.get_mut(index).ok_or(TestnetError::NoSuchNode { index, nodes: count })?;
        let advertise = node.shaper.as_ref().map(Shaper::address);
        let again = |addresses| Launch {
            index,
            program: &config.program,
            model: &config.model,
            spec: &node.spec,
            data_dir: &node.data_dir,
            addresses,
            advertise,
            bootstrap: &bootstrap,
        };
        let same = node.addresses.first().map(|address| (address, node.data_listen));
        let (process, ready) = match launch(again(same)).await {
            // Somebody else may have taken a port meanwhile.
            Err(TestnetError::Ended { .. }) if same.is_some() => launch(again(None)).await?,
            started => started?,
        };
        if let Some(shaper) = &node.shaper {
            shaper.set_target(Some(ready.data_listen));
        }
        node.addresses = ready.addresses;
        node.data_listen = ready.data_listen;
        node.process = Some(process);
        Ok(())
    }

    /// Changes what the paths to a volunteer's data plane and from it do to packets.
    ///
    /// # Errors
    /// There is no such volunteer, or the network was started without shapers.
    pub fn shape(&mut self, index: usize, to_node: Shape, from_node: Shape) -> Result<(), TestnetError> {
        let shaper = self.node(index)?.shaper.as_ref().ok_or(TestnetError::NoShaper)?;
        shaper.set_shapes(to_node, from_node);
        Ok(())
    }

    /// Cuts the path to a volunteer's data plane, or from it, or heals what is not to be cut.
    ///
    /// # Errors
    /// As [`Testnet::shape`].
    pub fn cut(&mut self, index: usize, to_node: bool, from_node: bool) -> Result<(), TestnetError> {
        let shape = self.config.shape.ok_or(TestnetError::NoShaper)?;
        self.shape(index, Shape { cut: to_node, ..shape }, Shape { cut: from_node, ..shape })
    }

    /// Undoes all trouble: every path is as at the start, volunteers that were killed run again, paused and slowed ones go on.
    ///
    /// # Errors
    /// A volunteer does not start again.
    pub async fn heal(&mut self) -> Result<(), TestnetError> {
        for index in 0..self.nodes.len() {
            if let Some(shape) = self.config.shape {
                self.shape(index, shape, shape)?;
            }
            if self.node(index)?.is_alive() {
                self.resume(index).await?;
            } else {
                self.restart(index).await?;
            }
        }
        Ok(())
    }

    /// Ends every volunteer politely, and by force if it does not go.
    pub async fn stop(mut self) {
        let processes: Vec<Process> = self.nodes.iter_mut().filter_map(|node| node.process.take()).collect();
        futures::future::join_all(processes.into_iter().map(Process::stop)).await;
    }
}

impl Node {
    /// Its place in the network, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its peer id, the same after a restart.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.peer_id
    }

    /// How many experts it hosts.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// What it hosts, as `--experts` reads it.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Its control-plane addresses.
    #[must_use]
    pub fn addresses(&self) -> &[Multiaddr] {
        &self.addresses
    }

    /// Where clients reach its data plane: the shaper before it, if there is one.
    #[must_use]
    pub fn data_address(&self) -> SocketAddr {
        self.shaper.as_ref().map_or(self.data_listen, Shaper::address)
    }

    /// The shaper before its data plane.
    #[must_use]
    pub fn shaper(&self) -> Option<&Shaper> {
        self.shaper.as_ref()
    }

    /// How it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.process.as_ref().map_or(State::Killed, Process::state)
    }

    /// Whether the process runs, perhaps paused; one that ended by itself does not.
    pub fn is_alive(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_alive)
    }

    /// The operating system's process number, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().and_then(Process::pid)
    }
}
