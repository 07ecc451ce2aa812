//! The client: the trunk in this process, the experts on the network or beside it.

mod generation;
mod score;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hanse_model::{
    Checkpoint, CheckpointError, ComputeError, DeviceError, DraftHead, GenerationDefaults, GenerationDefaultsError,
    LoadError, LocalExperts, ModelSpec, Tokenizer, TokenizerError, Trunk, TrunkCard, compute_pool,
};
use hanse_protocol::{Identity, ModelId};
use rayon::ThreadPool;

use crate::directory::{ExpertLayout, PeerReport};
use crate::engine::{DraftModel, Drafter, Engine, EngineConfig, EngineStatus, HeadDrafter, ModelDrafter};
use crate::generate::GenerateRequest;
use crate::network::{ExpertNetwork, JoinError, NetworkConfig};
pub use generation::{Generation, Progress, Summary};
pub use score::Score;

/// The client's side of a model: where its files are and how many threads compute the trunk.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// A Hugging Face model folder.
    pub dir: PathBuf,
    /// Threads for the trunk (and, locally, the experts); 0 takes one per core.
    pub threads: usize,
}

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The folder is not a checkpoint that can be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor is missing or has a wrong shape.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The tokenizer's files are damaged.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// `generation_config.json` is damaged.
    #[error(transparent)]
    Defaults(#[from] GenerationDefaultsError),
    /// The card that the trunk was to lie on does not work.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Nothing can be computed here.
    #[error("cannot start the compute threads: {0}")]
    Threads(#[from] ComputeError),
    /// The network could not be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The model that should draft has other tokens. Choose one of the same family.
    #[error("{} has another vocabulary than the model that it should draft for", draft.display())]
    OtherVocabulary {
        /// The draft model's folder.
        draft: PathBuf,
    },
    /// A background task died; this is a defect.
    #[error("an internal task ended unexpectedly: {0}")]
    Task(String),
}

/// Where experts are computed.
#[derive(Debug)]
pub(crate) enum Place {
    Here(Arc<LocalExperts>),
    Network(Arc<ExpertNetwork>),
}

/// A model ready to generate. Cheap to clone; generations may run side by side.
#[derive(Debug, Clone)]
pub struct Client {
    core: Arc<Core>,
    engine: Arc<Engine>,
    drafts: DraftSources,
}

/// What a client drafts with besides the text and the experts that it holds.
#[derive(Debug, Clone, Default)]
struct DraftSources {
    model: Option<Arc<DraftModel>>,
    head: Option<Arc<DraftHead>>,
}

/// What a model is computed with.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) trunk: Trunk,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) defaults: GenerationDefaults,
    pub(crate) place: Place,
    pub(crate) pool: Arc<ThreadPool>,
}

/// The experts of a model, as the router needs to know them.
#[must_use]
pub fn layout_of(spec: &ModelSpec) -> ExpertLayout {
    let layers = spec.moe_layers().map(|(layer, moe)| (layer as u32, moe.experts as u32)).collect();
    ExpertLayout { hidden_size: spec.hidden_size as u32, layers }
}

impl Client {
    /// A client that computes the experts in this process from the same folder: the reference for what the network gives.
    ///
    /// Blocks while it reads the folder.
    ///
    /// # Errors
    /// A folder that is damaged or of an unknown family.
    pub fn local(config: &ModelConfig) -> Result<Self, ClientError> {
        Self::local_with(&Checkpoint::open(&config.dir)?, config.threads)
    }

    /// Like [`Client::local`], with a checkpoint that is open.
    ///
    /// # Errors
    /// As [`Client::local`].
    pub fn local_with(checkpoint: &Checkpoint, threads: usize) -> Result<Self, ClientError> {
        let pool = start_pool(threads)?;
        let experts = Arc::new(LocalExperts::load(checkpoint, pool.clone())?);
        Self::assemble(checkpoint, pool, Place::Here(experts))
    }

    /// Joins the network, finds peers for every expert of the model in `config.dir`, and loads the trunk.
    ///
    /// `model` is the model's id, which is [`weights::model_id`](crate::weights::model_id) of the folder.
    ///
    /// # Errors
    /// As [`Client::local`], and see [`JoinError`].
    pub async fn connect(
        config: &ModelConfig,
        model: ModelId,
        identity: &Identity,
        network: NetworkConfig,
    ) -> Result<Self, ClientError> {
        Self::connect_with(&Checkpoint::open(&config.dir)?, config.threads, model, identity, network).await
    }

    /// Like [`Client::connect`], with a checkpoint that is open, such as that of a
    /// [`RemoteModel`](crate::weights::RemoteModel).
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_with(
        checkpoint: &Checkpoint,
        threads: usize,
        model: ModelId,
        identity: &Identity,
        network: NetworkConfig,
    ) -> Result<Self, ClientError> {
        let layout = layout_of(checkpoint.spec());
        let network = Arc::new(ExpertNetwork::join(identity, model, layout, network).await?);
        let checkpoint = checkpoint.clone();
        let assemble = move || Self::assemble(&checkpoint, start_pool(threads)?, Place::Network(network));
        let assembled = tokio::task::spawn_blocking(assemble).await;
        assembled.map_err(|e| ClientError::Task(e.to_string()))?
    }

    fn assemble(checkpoint: &Checkpoint, pool: Arc<ThreadPool>, place: Place) -> Result<Self, ClientError> {
        let trunk = Trunk::load(checkpoint, pool.clone())?;
        // A checkpoint without a tokenizer is usable with token ids.
        let dir = checkpoint.dir();
        let tokenizer = has_tokenizer(dir).then(|| Tokenizer::load(dir)).transpose()?;
        let defaults = GenerationDefaults::load(dir)?;
        let core = Arc::new(Core { trunk, tokenizer, defaults, place, pool });
        Ok(Self::new(core, EngineConfig::default(), DraftSources::default()))
    }

    fn new(core: Arc<Core>, config: EngineConfig, drafts: DraftSources) -> Self {
        let mut drafters: Vec<Box<dyn Drafter>> = Vec::new();
        if let Some(head) = &drafts.head {
            drafters.push(Box::new(HeadDrafter::new(head.clone())));
        }
        if let Some(model) = &drafts.model {
            drafters.push(Box::new(ModelDrafter::of(model.clone())));
        }
        if let Place::Network(network) = &core.place
            && let Some(resident) = &network.config.resident
        {
            drafters.push(Box::new(ModelDrafter::with_resident(resident.clone())));
        }
        Self { core, engine: Arc::new(Engine::new(config, drafters)), drafts }
    }

    /// The same client with other limits to what its generations may use together.
    #[must_use]
    pub fn with_engine(self, config: EngineConfig) -> Self {
        Self::new(self.core, config, self.drafts)
    }

    /// The same client with its trunk's matrices on a card as well, which multiplies with them from then on. No token changes. What has no
    /// room there, attention over keys and values, and what drafts stay with the processor; so does everything once the card has failed.
    /// See [`Trunk::place`]; the card is opened with [`DeviceChoice::open_for_trunk`](hanse_model::DeviceChoice::open_for_trunk).
    ///
    /// Blocks while weights are copied.
    ///
    /// # Errors
    /// [`ClientError::Device`] if the card does not work.
    pub fn with_trunk_on(self, card: &TrunkCard) -> Result<Self, ClientError> {
        self.core.trunk.place(card)?;
        Ok(self)
    }

    /// The same client, which also drafts with the multi-token-prediction head that the model's checkpoint carries, its experts
    /// included: all of it is computed in this process. No token changes. Caches then keep each position's last hidden state.
    ///
    /// Blocks while it finds the tensors, which are mapped, not copied.
    ///
    /// # Errors
    /// [`CheckpointError::NoDraftHead`] if the checkpoint has none.
    pub fn with_draft_head(self) -> Result<Self, ClientError> {
        let head = Some(Arc::new(self.core.trunk.draft_head()?));
        let config = self.engine.config();
        Ok(Self::new(self.core, config, DraftSources { head, ..self.drafts }))
    }

    /// The same client with a small model, all of it in this process, that drafts tokens: they are verified several in a pass, so that
    /// fewer round trips are waited for. No token changes.
    ///
    /// Blocks while it reads the checkpoint.
    ///
    /// # Errors
    /// [`ClientError::OtherVocabulary`] if its tokens are not those of this model; a damaged checkpoint.
    pub fn with_draft_model(self, checkpoint: &Checkpoint) -> Result<Self, ClientError> {
        let dir = checkpoint.dir();
        let tokenizer = has_tokenizer(dir).then(|| Tokenizer::load(dir)).transpose()?;
        let alike = match (&self.core.tokenizer, &tokenizer) {
            (Some(mine), Some(its)) => mine.vocabulary() == its.vocabulary(),
            _ => self.spec().vocab_size == checkpoint.spec().vocab_size,
        };
        if !alike {
            return Err(ClientError::OtherVocabulary { draft: dir.to_owned() });
        }
        let trunk = Trunk::load(checkpoint, self.core.pool.clone())?;
        let experts = Arc::new(LocalExperts::load(checkpoint, self.core.pool.clone())?);
        let config = self.engine.config();
        let model = Some(Arc::new(DraftModel { trunk, experts }));
        Ok(Self::new(self.core, config, DraftSources { model, ..self.drafts }))
    }

    #[cfg(test)]
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// What generations may use.
    #[must_use]
    pub fn engine_config(&self) -> EngineConfig {
        self.engine.config()
    }

    /// What the generations in progress are using.
    #[must_use]
    pub fn engine(&self) -> EngineStatus {
        self.engine.status()
    }

    /// The most tokens that a prompt and its answer may have together: the model's context, or what there is memory for.
    #[must_use]
    pub fn context(&self) -> usize {
        self.engine.context(&self.core)
    }

    /// What the model is.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        self.core.trunk.spec()
    }

    /// The folder's tokenizer, if it has one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.core.tokenizer.as_ref()
    }

    /// The folder's recommended sampling and end-of-sequence tokens.
    #[must_use]
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.core.defaults
    }

    /// The network that computes the experts; `None` for a local client.
    #[must_use]
    pub fn network(&self) -> Option<&Arc<ExpertNetwork>> {
        match &self.core.place {
            Place::Here(_) => None,
            Place::Network(network) => Some(network),
        }
    }

    /// The peers known at present; none for a local client.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerReport> {
        self.network().map(|network| network.directory().peers()).unwrap_or_default()
    }

    /// Leaves the network, see [`ExpertNetwork::shutdown`]; generations in progress fail. Nothing to do for a local client.
    pub async fn close(&self) {
        if let Some(network) = self.network() {
            network.shutdown().await;
        }
    }

    /// Starts a generation and returns the stream of its tokens. It advances together with the client's other generations, which
    /// changes none of its tokens.
    ///
    /// Must be called within a tokio runtime. Dropping the stream ends the generation within one step.
    #[must_use]
    pub fn generate(&self, request: GenerateRequest) -> Generation {
        Generation::new(self.engine.submit(&self.core, request))
    }
}

fn start_pool(threads: usize) -> Result<Arc<ThreadPool>, ClientError> {
    Ok(Arc::new(compute_pool(threads)?))
}

fn has_tokenizer(dir: &Path) -> bool {
    dir.join("tokenizer.json").exists()
}
