//! A model whose weights are fetched when they are needed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hanse_model::{Checkpoint, CheckpointError, ExpertParts, Mapping, Part, PartSource, Parts, Run, TrunkPart};
use hanse_protocol::{BlobHash, Manifest, ModelId, SignedManifest};

use super::cache::{Cache, CacheError, Pin};
use super::describe::stored_dtype;
use super::fetch::{FetchError, Fetcher};
use super::http::{Hub, RepositoryError};
use super::peers::{ManifestSearchError, Peers};
use super::source::{Item, Source, What};
use crate::network::{JoinError, NetworkConfig};

/// How long to wait for somebody who gives out the manifest, and for each blob that nobody has.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A model that is known by its manifest and fetched into a cache.
#[derive(Debug, Clone)]
pub struct RemoteModel {
    signed: Arc<SignedManifest>,
    fetcher: Arc<Fetcher>,
    checkpoint: Checkpoint,
    pins: Arc<Mutex<Vec<Pin>>>,
}

/// Why a model cannot be used without a folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The network could not be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Nobody gave the manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestSearchError),
    /// Its parts do not make the model that its config calls for.
    #[error("the manifest of model {model} makes no model: {reason}")]
    NoModel {
        /// The model.
        model: ModelId,
        /// What is wrong.
        reason: CheckpointError,
    },
    /// A repository cannot be used.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Something cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl RemoteModel {
    /// Finds the model with this id on the network: its manifest is in the cache or comes from a peer.
    ///
    /// Must be called within a tokio runtime, which fetches what is needed later.
    ///
    /// # Errors
    /// [`RemoteError`], as its variants say.
    pub async fn find(
        model: ModelId,
        cache: Cache,
        network: &NetworkConfig,
        hubs: &[Hub],
    ) -> Result<Self, RemoteError> {
        let peers = Arc::new(Peers::join(model, network).await?);
        let kept = cached_manifest(&cache, model);
        let (giver, signed) = match kept {
            Some(signed) => (None, signed),
            None => {
                let (giver, signed) = peers.manifest(network.join_timeout.max(Duration::from_secs(1))).await?;
                keep_manifest(&cache, &signed)?;
                (Some(giver), signed)
            }
        };
        let sources = sources(hubs, signed.manifest()).await?;
        let fetcher = Fetcher::new(cache, sources, Some(peers), PATIENCE);
        if let Some(giver) = giver {
            fetcher.count(giver, signed.encode().len());
        }
        Self::new(signed, Arc::new(fetcher))
    }

    /// The model of a repository that holds a manifest. Its weights come from there, and from `more` repositories.
    ///
    /// Must be called within a tokio runtime, which fetches what is needed later.
    ///
    /// # Errors
    /// [`RemoteError`], as its variants say.
    pub async fn of_hub(hub: Hub, cache: Cache, more: &[Hub]) -> Result<Self, RemoteError> {
        let (signed, locations) = hub.manifest().await?;
        let mut sources = sources(more, signed.manifest()).await?;
        sources.insert(0, Arc::new(hub.source(signed.manifest().clone(), locations)));
        keep_manifest(&cache, &signed)?;
        Self::new(signed, Arc::new(Fetcher::new(cache, sources, None, PATIENCE)))
    }

    /// The model of a manifest that is at hand.
    ///
    /// Must be called within a tokio runtime, which fetches what is needed later.
    ///
    /// # Errors
    /// `NoModel`, `Cache`.
    pub fn new(signed: SignedManifest, fetcher: Arc<Fetcher>) -> Result<Self, RemoteError> {
        let signed = Arc::new(signed);
        let manifest = signed.manifest();
        let model = signed.id();
        let dir = folder_of(fetcher.cache(), model);
        std::fs::create_dir_all(&dir).map_err(|source| CacheError::of(dir.clone(), source))?;
        write_file(&dir.join("config.json"), manifest.config.as_bytes())?;
        let source = Arc::new(OnDemand {
            signed: signed.clone(),
            fetcher: fetcher.clone(),
            runtime: tokio::runtime::Handle::current(),
        });
        let checkpoint = Checkpoint::from_parts(&dir, manifest.config.clone(), parts_of(manifest), source)
            .map_err(|reason| RemoteError::NoModel { model, reason })?;
        let sizes = checkpoint.sizes();
        for layer in &manifest.experts {
            let expected = sizes.bytes_per_expert.get(layer.layer as usize).copied().unwrap_or(0);
            if layer.expert_bytes() != expected {
                let part = format!("an expert of layer {}", layer.layer);
                return Err(RemoteError::NoModel { model, reason: CheckpointError::Unlisted { part } });
            }
        }
        Ok(Self { signed, fetcher, checkpoint, pins: Arc::default() })
    }

    /// The model's id.
    #[must_use]
    pub fn id(&self) -> ModelId {
        self.signed.id()
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> &SignedManifest {
        &self.signed
    }

    /// A checkpoint that fetches what is loaded from it and is not in the cache. Loading blocks meanwhile.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What fetches.
    #[must_use]
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// Fetches an expert unless it is in the cache, and says that it is in use; then loading it from [`Self::checkpoint`] does not
    /// wait. `None` if the manifest does not list it.
    ///
    /// A dropped future leaves what has been fetched for another time.
    ///
    /// # Errors
    /// [`FetchError`], as its variants say.
    pub async fn fetch_expert(&self, layer: u32, expert: u32) -> Result<Option<Pin>, FetchError> {
        match Item::find(self.signed.manifest(), What::Expert { layer, expert }) {
            Some(item) => self.fetcher.fetch_pinned(&item).await.map(Some),
            None => Ok(None),
        }
    }

    /// The experts that are in the cache, as (layer, expert), ascending. Asks the file system for each of the model's experts.
    #[must_use]
    pub fn cached_experts(&self) -> Vec<(u32, u32)> {
        self.experts(|item| self.fetcher.cache().has(&item.blob))
    }

    /// The experts that are not in the cache and that nobody at hand may have, as (layer, expert), ascending.
    #[must_use]
    pub fn unobtainable_experts(&self) -> Vec<(u32, u32)> {
        self.experts(|item| !self.fetcher.cache().has(&item.blob) && !self.fetcher.has_source(item))
    }

    fn experts(&self, is_wanted: impl Fn(&Item) -> bool) -> Vec<(u32, u32)> {
        let manifest = self.signed.manifest();
        let all = manifest
            .experts
            .iter()
            .flat_map(|layer| (0u32..).zip(&layer.hashes).map(|(expert, _)| (layer.layer, expert)));
        let wanted = |&(layer, expert): &(u32, u32)| {
            Item::find(manifest, What::Expert { layer, expert }).is_some_and(|item| is_wanted(&item))
        };
        all.filter(wanted).collect()
    }

    /// Fetches what a client keeps: the trunk and the tokenizer. `progress` is told bytes done and bytes in all.
    ///
    /// # Errors
    /// `Fetch`, `Cache`.
    pub async fn fetch_trunk(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<(), RemoteError> {
        let manifest = self.signed.manifest();
        let pins = self.fetcher.fetch_all(&Item::trunk_of(manifest), progress).await?;
        // Nobody removes the first while the last is fetched, nor before all is loaded.
        *self.pins.lock().unwrap_or_else(PoisonError::into_inner) = pins;
        let dir = self.checkpoint.dir();
        for file in &manifest.files {
            let path = dir.join(&file.name);
            if std::fs::read(&path).is_ok_and(|content| BlobHash::of(&content) == file.blob.hash) {
                continue;
            }
            let cache = self.fetcher.cache();
            let failed = |source| CacheError::of(path.clone(), source);
            if let Some(mut blob) = cache.open(&file.blob)? {
                let mut content = Vec::new();
                std::io::Read::read_to_end(&mut blob.file, &mut content).map_err(failed)?;
                write_file(&path, &content)?;
            }
        }
        Ok(())
    }

    /// Leaves the network that was joined for fetching. What is in the cache can still be loaded.
    pub async fn close(&self) {
        if let Some(peers) = self.fetcher.peers() {
            peers.shutdown().await;
        }
    }
}

/// Repositories as sources, each by its own manifest if it has this model's, else by the headers of its files.
async fn sources(hubs: &[Hub], manifest: &Manifest) -> Result<Vec<Arc<dyn Source>>, RepositoryError> {
    let mut sources: Vec<Arc<dyn Source>> = Vec::new();
    for hub in hubs {
        let own = hub.manifest().await.ok().filter(|(signed, _)| signed.manifest() == manifest);
        sources.push(Arc::new(match own {
            Some((_, locations)) => hub.clone().source(manifest.clone(), locations),
            None => hub.clone().find(manifest.clone()).await?,
        }));
    }
    Ok(sources)
}

/// The folder of a model's small files.
fn folder_of(cache: &Cache, model: ModelId) -> PathBuf {
    cache.dir().join("models").join(model.to_string())
}

fn cached_manifest(cache: &Cache, model: ModelId) -> Option<SignedManifest> {
    let bytes = std::fs::read(folder_of(cache, model).join("manifest")).ok()?;
    SignedManifest::decode(&bytes).ok().filter(|signed| signed.id() == model)
}

fn keep_manifest(cache: &Cache, signed: &SignedManifest) -> Result<(), CacheError> {
    let dir = folder_of(cache, signed.id());
    std::fs::create_dir_all(&dir).map_err(|source| CacheError::of(dir.clone(), source))?;
    write_file(&dir.join("manifest"), &signed.encode())
}

/// Another process may read the file meanwhile: it appears whole or not at all.
fn write_file(path: &Path, content: &[u8]) -> Result<(), CacheError> {
    let failed = |source| CacheError::of(path.to_owned(), source);
    if std::fs::read(path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    std::fs::write(&temporary, content).and_then(|()| std::fs::rename(&temporary, path)).map_err(failed)
}

fn parts_of(manifest: &Manifest) -> Parts {
    let trunk = manifest.trunk.iter().map(|tensor| TrunkPart {
        name: tensor.name.clone(),
        dtype: stored_dtype(tensor.dtype),
        shape: tensor.shape.iter().map(|size| usize::try_from(*size).unwrap_or(usize::MAX)).collect(),
    });
    let experts = manifest.experts.iter().map(|layer| ExpertParts {
        layer: layer.layer as usize,
        experts: layer.hashes.len(),
        runs: layer.runs.iter().map(|run| Run { dtype: stored_dtype(run.dtype), values: run.values }).collect(),
    });
    Parts { trunk: trunk.collect(), experts: experts.collect() }
}

/// Gives parts from the cache, and fetches those that are not there.
#[derive(Debug)]
struct OnDemand {
    signed: Arc<SignedManifest>,
    fetcher: Arc<Fetcher>,
    runtime: tokio::runtime::Handle,
}

impl PartSource for OnDemand {
    fn open(&self, part: Part<'_>) -> Result<Arc<Mapping>, Box<dyn std::error::Error + Send + Sync>> {
        let what = match part {
            Part::Trunk(name) => What::Trunk(name.to_owned()),
            Part::Expert { layer, expert } => What::Expert { layer: layer as u32, expert: expert as u32 },
        };
        let item = Item::find(self.signed.manifest(), what).ok_or("the manifest does not list it")?;
        loop {
            if let Some(opened) = self.fetcher.cache().open(&item.blob)? {
                let mapping = Mapping::guarded(&opened.file, opened.pin)?;
                if BlobHash::of(&mapping) == item.blob.hash {
                    return Ok(Arc::new(mapping));
                }
                tracing::warn!(what = %item.what, "damaged in the cache: fetched again");
                self.fetcher.cache().remove(item.blob.hash);
            }
            // On a thread of its own, since this one may belong to the runtime.
            let fetched =
                std::thread::scope(|scope| scope.spawn(|| self.runtime.block_on(self.fetcher.fetch(&item))).join());
            fetched.map_err(|_| "fetching ended unexpectedly")??;
        }
    }
}
