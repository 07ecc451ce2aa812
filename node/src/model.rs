//! The model that `--model` names: a folder, or one that is known by its id and fetched.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use hanse_model::Checkpoint;
use hanse_protocol::{Identity, Locations, ModelId, SignedManifest};
use hanse_router::NetworkConfig;
use hanse_router::weights::describe::{open_described, read_manifest};
use hanse_router::weights::http::ParseRepositoryError;
use hanse_router::weights::{Cache, Hub, RemoteModel, Repository, Shelf, describe};

use crate::cli::CacheArgs;
use crate::{output, paths};

/// What `--model` may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelRef {
    /// A model folder.
    Folder(PathBuf),
    /// A model's id.
    Id(ModelId),
    /// A repository of a hub that holds a manifest.
    Hub(Repository),
}

impl FromStr for ModelRef {
    type Err = ParseRepositoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("hf:") {
            return text.parse().map(Self::Hub);
        }
        match text.parse() {
            Ok(id) if !Path::new(text).exists() => Ok(Self::Id(id)),
            _ => Ok(Self::Folder(text.into())),
        }
    }
}

impl ModelRef {
    /// What people call it: the folder's or the repository's name, or the id.
    pub(crate) fn short_name(&self) -> String {
        match self {
            Self::Folder(dir) => {
                let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
                dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
            }
            Self::Id(id) => id.to_string(),
            Self::Hub(repository) => repository.repo.clone(),
        }
    }
}

/// A model folder with its manifest.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) signed: SignedManifest,
    pub(crate) locations: Locations,
}

impl Folder {
    /// Opens a folder. Its manifest is the one that lies in it, and then what is loaded is compared with it; or it is made, once,
    /// with a progress bar.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        if let Some((signed, locations)) = read_manifest(dir)? {
            let checkpoint = open_described(dir, signed.manifest())?;
            return Ok(Self { checkpoint, signed, locations });
        }
        let checkpoint = Checkpoint::open(dir)?;
        // Remembering is a convenience: whatever fails in it, the manifest is made.
        let remembered = remembered_at(dir);
        let known = remembered.as_deref().and_then(|path| std::fs::read_to_string(path).ok());
        if let Some((signed, locations)) = known.and_then(|text| SignedManifest::from_json(&text).ok()) {
            return Ok(Self { checkpoint, signed, locations });
        }
        // Nobody publishes it: the signature says nothing but that it is whole.
        let (signed, locations) = make_manifest(&checkpoint, &Identity::generate())?;
        if let Some(path) = remembered {
            remember(&path, &signed.to_json(&locations));
        }
        Ok(Self { checkpoint, signed, locations })
    }

    pub(crate) fn id(&self) -> ModelId {
        self.signed.id()
    }
}

/// A model ready to be used.
#[derive(Debug)]
pub(crate) enum Model {
    Folder(Box<Folder>),
    Remote(RemoteModel),
}

impl Model {
    /// Opens what `--model` names; one that is not here is looked for on the network.
    pub(crate) async fn open(reference: &ModelRef, network: &NetworkConfig, cache: &CacheArgs) -> anyhow::Result<Self> {
        match reference {
            ModelRef::Folder(dir) => {
                let dir = dir.clone();
                let opened = tokio::task::spawn_blocking(move || Folder::open(&dir)).await??;
                Ok(Self::Folder(Box::new(opened)))
            }
            ModelRef::Id(id) => {
                if network.bootstrap.is_empty() && !network.mdns {
                    bail!("a model named by its id is fetched from its network: give --bootstrap ADDR, or a folder");
                }
                let spinner = output::spinner("looking for the model");
                let found = RemoteModel::find(*id, cache.open()?, network, &cache.hubs()?).await;
                spinner.finish_and_clear();
                Ok(Self::Remote(found?))
            }
            ModelRef::Hub(repository) => {
                let spinner = output::spinner("reading the repository");
                let found =
                    RemoteModel::of_hub(Hub::from_env(repository.clone())?, cache.open()?, &cache.hubs()?).await;
                spinner.finish_and_clear();
                Ok(Self::Remote(found?))
            }
        }
    }

    pub(crate) fn id(&self) -> ModelId {
        match self {
            Self::Folder(folder) => folder.id(),
            Self::Remote(remote) => remote.id(),
        }
    }

    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        match self {
            Self::Folder(folder) => &folder.checkpoint,
            Self::Remote(remote) => remote.checkpoint(),
        }
    }

    /// Fetches trunk and tokenizer unless they are here, with a progress bar.
    pub(crate) async fn fetch_trunk(&self) -> anyhow::Result<()> {
        let Self::Remote(remote) = self else { return Ok(()) };
        let bar = output::byte_bar("fetching the trunk");
        let shown = bar.clone();
        let fetched = remote
            .fetch_trunk(&move |done, total| {
                shown.set_length(total);
                shown.set_position(done);
            })
            .await;
        bar.finish_and_clear();
        Ok(fetched?)
    }

    /// What can be given to others.
    pub(crate) fn shelf(&self) -> anyhow::Result<Arc<Shelf>> {
        Ok(Arc::new(match self {
            Self::Folder(folder) => {
                let dir = folder.checkpoint.dir();
                let shelf = Shelf::of_folder(folder.signed.clone(), &folder.locations, dir);
                shelf.with_context(|| format!("cannot open the weights in {}", dir.display()))?
            }
            Self::Remote(remote) => Shelf::of_cache(remote.manifest().clone(), remote.fetcher().cache().clone()),
        }))
    }
}

impl CacheArgs {
    fn hubs(&self) -> anyhow::Result<Vec<Hub>> {
        self.source.iter().map(|repository| Ok(Hub::from_env(repository.clone())?)).collect()
    }

    pub(crate) fn open(&self) -> anyhow::Result<Cache> {
        let default = || paths::cache_dir().map(|dir| dir.join("weights"));
        let dir =
            self.cache_dir.clone().or_else(default).context("the user has no cache folder: give --cache-dir DIR")?;
        Ok(Cache::new(&dir, self.cache_size.map_or(u64::MAX, |size| size.as_u64()))?)
    }
}

/// Hashes a folder, with a progress bar.
pub(crate) fn make_manifest(
    checkpoint: &Checkpoint,
    publisher: &Identity,
) -> anyhow::Result<(SignedManifest, Locations)> {
    let bar = output::byte_bar("reading weights");
    let described = describe(checkpoint, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let described = described.context("cannot make the model's manifest")?;
    Ok((SignedManifest::sign(described.manifest, publisher)?, described.locations))
}

/// Where the manifest of a folder without one is kept: under a name made of the folder's files, their sizes and times of change.
fn remembered_at(dir: &Path) -> Option<PathBuf> {
    use std::time::UNIX_EPOCH;
    let dir = dir.canonicalize().ok()?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(dir.as_os_str().as_encoded_bytes());
    let mut entries: Vec<_> = std::fs::read_dir(&dir).ok()?.collect::<Result<_, _>>().ok()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let metadata = std::fs::metadata(entry.path()).ok()?;
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        hasher.update(entry.file_name().as_encoded_bytes());
        hasher.update(&[0]);
        hasher.update(&metadata.len().to_le_bytes());
        hasher.update(&changed.as_nanos().to_le_bytes());
    }
    Some(paths::cache_dir()?.join("manifests").join(hasher.finalize().to_hex().as_str()))
}

fn remember(path: &Path, manifest: &str) {
    let Some(folder) = path.parent() else { return };
    if std::fs::create_dir_all(folder).is_err() {
        return;
    }
    // Written under another name and moved, so that nobody reads half a manifest.
    let Ok(mut file) = tempfile::NamedTempFile::new_in(folder) else { return };
    if std::io::Write::write_all(&mut file, manifest.as_bytes()).is_ok() {
        let _ = file.persist(path);
    }
}
