//! Volunteers and clients in this process, on loopback, found through the DHT.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use hanse_model::{Checkpoint, DeviceChoice};
use hanse_node::placement::Pace;
use hanse_node::{Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::{Identity, ModelId, Multiaddr};
use hanse_router::client::layout_of;
use hanse_router::{Client, GenerateError, GenerateRequest, ModelConfig, NetworkConfig, NetworkUse};
use tokio::runtime::Runtime;

/// What is waited for comes within this, or the test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Networks in tests rebalance thirty times as fast as others.
pub const PACE: Pace = Pace { interval: Duration::from_secs(1), spacing: Duration::from_millis(300) };

/// The runtime of one test.
#[must_use]
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A network of one model.
#[derive(Debug)]
pub struct Net {
    /// The model's folder.
    pub dir: PathBuf,
    /// The model's id.
    pub model: ModelId,
    /// Those that run; the first is the one that others join through.
    pub volunteers: Vec<Volunteer>,
    checkpoint: Checkpoint,
    /// A member of another model's net in the same network.
    through: Option<Multiaddr>,
}

/// A model folder's id.
#[must_use]
pub fn model_id(dir: &Path) -> ModelId {
    hanse_router::weights::model_id(&Checkpoint::open(dir).unwrap()).unwrap()
}

impl Net {
    /// One volunteer for each of `specs`, as `--experts` reads them.
    pub async fn start(dir: &Path, specs: &[&str]) -> Self {
        Self::start_through(None, dir, specs).await
    }

    /// The same of another model in the same network.
    pub async fn beside(&self, dir: &Path, specs: &[&str]) -> Self {
        Self::start_through(Some(self.bootstrap()), dir, specs).await
    }

    async fn start_through(through: Option<Multiaddr>, dir: &Path, specs: &[&str]) -> Self {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let model = hanse_router::weights::model_id(&checkpoint).unwrap();
        let mut net = Self { dir: dir.to_owned(), model, volunteers: Vec::new(), checkpoint, through };
        for spec in specs {
            net.add(spec).await;
        }
        net
    }

    /// Two volunteers: one has the even experts of every layer, the other the odd ones, so that almost every row needs both.
    pub async fn halves(dir: &Path) -> Self {
        let [even, odd] = halves(dir);
        Self::start(dir, &[&even, &odd]).await
    }

    /// One more volunteer, which joins through the first. Gives its place.
    pub async fn add(&mut self, spec: &str) -> usize {
        let volunteer = self.volunteer(Hosting::Experts(spec.parse().unwrap())).await;
        self.volunteers.push(volunteer);
        self.volunteers.len() - 1
    }

    /// One more volunteer with memory for so many experts of the bundled model, which chooses and rebalances; it joins through
    /// the first. Not yet among [`Self::volunteers`], so that several can start at the same time.
    pub async fn with_memory(&self, experts: u64) -> Volunteer {
        let bytes = self.checkpoint.sizes().bytes_per_expert[0];
        self.volunteer(Hosting::MemoryBytes(experts * bytes)).await
    }

    async fn volunteer(&self, hosting: Hosting) -> Volunteer {
        let config = VolunteerConfig {
            bootstrap: self
                .through
                .clone()
                .or_else(|| self.volunteers.first().map(first_address))
                .into_iter()
                .collect(),
            hosting,
            // What `--device` takes; the processor by default.
            device: std::env::var("HANSE_TEST_DEVICE").map_or(DeviceChoice::Cpu, |name| name.parse().unwrap()),
            threads: 1,
            pace: PACE,
            ..VolunteerConfig::default()
        };
        let identity = Identity::generate();
        Volunteer::start(&identity, &self.checkpoint, self.model, config, |_, _| ()).await.unwrap()
    }

    /// How many volunteers hold each expert: the least and the most.
    #[must_use]
    pub fn replicas(&self) -> (usize, usize) {
        replicas(&self.dir, &self.volunteers)
    }

    /// The one address that clients are given.
    #[must_use]
    pub fn bootstrap(&self) -> Multiaddr {
        first_address(&self.volunteers[0])
    }

    /// How a client joins, f32 on the wire.
    #[must_use]
    pub fn config(&self) -> NetworkConfig {
        NetworkConfig { bootstrap: vec![self.bootstrap()], join_timeout: PATIENCE, ..NetworkConfig::default() }
    }

    /// A client of this network.
    pub async fn client(&self) -> Client {
        self.client_with(self.config()).await
    }

    /// A client of this network that joins as `config` says.
    pub async fn client_with(&self, config: NetworkConfig) -> Client {
        let client =
            Client::connect(&model_config(&self.dir), self.model, &Identity::generate(), config).await.unwrap();
        // What `--device` of a client takes; the processor by default.
        let device = std::env::var("HANSE_TEST_TRUNK").map_or(DeviceChoice::Cpu, |name| name.parse().unwrap());
        let place = move || match device.open_for_trunk().unwrap() {
            Some(card) => client.with_trunk_on(&card).unwrap(),
            None => client,
        };
        tokio::task::spawn_blocking(place).await.unwrap()
    }

    /// (row, expert) pairs that all volunteers have computed.
    #[must_use]
    pub fn pairs(&self) -> u64 {
        self.volunteers.iter().map(|volunteer| volunteer.counts().pairs).sum()
    }
}

fn first_address(volunteer: &Volunteer) -> Multiaddr {
    volunteer.addresses()[0].clone()
}

/// How many of the volunteers hold each expert of a model folder: the least and the most.
#[must_use]
pub fn replicas(dir: &Path, volunteers: &[Volunteer]) -> (usize, usize) {
    let sets: Vec<_> = volunteers.iter().map(|volunteer| volunteer.store().hosted().unwrap()).collect();
    let layers = layout_of(Checkpoint::open(dir).unwrap().spec()).layers;
    let experts = layers.iter().flat_map(|(&layer, &experts)| (0..experts).map(move |expert| (layer, expert)));
    let counts: Vec<usize> =
        experts.map(|(layer, expert)| sets.iter().filter(|set| set.contains(layer, expert)).count()).collect();
    (counts.iter().copied().min().unwrap(), counts.into_iter().max().unwrap())
}

/// The even and the odd experts of every layer, as `--experts` reads them.
#[must_use]
pub fn halves(dir: &Path) -> [String; 2] {
    let layout = layout_of(Checkpoint::open(dir).unwrap().spec());
    [0, 1].map(|parity| {
        let experts = layout.layers.iter().flat_map(|(&layer, &experts)| {
            (0..experts).filter(move |expert| expert % 2 == parity).map(move |expert| format!("{layer}:{expert}"))
        });
        experts.collect::<Vec<_>>().join(",")
    })
}

/// The folder, and one thread for the trunk.
#[must_use]
pub fn model_config(dir: &Path) -> ModelConfig {
    ModelConfig { dir: dir.to_owned(), threads: 1 }
}

/// A copy of a model folder with one weight changed.
#[must_use]
pub fn changed_copy(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = copy.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    // The last tensor's last value, sign bit.
    *bytes.last_mut().unwrap() ^= 0x80;
    std::fs::write(&weights, bytes).unwrap();
    copy
}

/// A free port on loopback for the control plane.
#[must_use]
pub fn loopback() -> Multiaddr {
    "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap()
}

/// Greedy decoding of exactly `count` tokens.
#[must_use]
pub fn greedy(prompt: &[u32], count: usize) -> GenerateRequest {
    GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy(prompt.to_vec(), count) }
}

/// Runs a generation to its end: its tokens and what it cost.
///
/// # Errors
/// The generation's own.
pub async fn tokens(client: &Client, request: GenerateRequest) -> Result<(Vec<u32>, NetworkUse), GenerateError> {
    let mut generation = client.generate(request);
    let mut tokens = Vec::new();
    while let Some(token) = generation.next().await {
        tokens.push(token?.id);
    }
    Ok((tokens, generation.summary().unwrap().network.clone()))
}

/// Waits until `condition` is true; fails after [`PATIENCE`].
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
