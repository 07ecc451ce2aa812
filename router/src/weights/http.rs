//! A repository behind the HTTP endpoint of a model hub, read by byte range: `{endpoint}/{repo}/resolve/{revision}/{file}`.

mod read;
mod repository;

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use hanse_model::{CheckpointError, ExpertParts, weight_map_of_headers};
use hanse_protocol::{
    ExpertRun, Locations, MANIFEST_FILE, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest, ManifestError, Place,
    SignedManifest,
};
use reqwest::Client;
use reqwest::header::HeaderValue;

use super::describe::{expert_run, locations, tensor_dtype};
use super::source::{Item, Source, SourceError, What};
use read::{reason_of, retry, take};
pub use repository::{ParseRepositoryError, Repository};

/// Where repositories are unless `HF_ENDPOINT` says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Requests at a time.
const PARALLEL: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence in the middle of a body after which a connection is given up.
const READ_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_REDIRECTS: usize = 10;
/// Bytes of a safetensors header, and of an index.
const MAX_HEADER_BYTES: u64 = 100 << 20;
/// Bytes before a safetensors header: its length.
const PREFIX: u64 = 8;

/// Why a repository cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepositoryError {
    /// The endpoint or the token is malformed.
    #[error("cannot ask {endpoint}: {reason}")]
    Endpoint {
        /// The endpoint.
        endpoint: String,
        /// What is wrong.
        reason: String,
    },
    /// It has no manifest.
    #[error("{repository} has no {MANIFEST_FILE}: give the model's id with --model and the repository with --source")]
    NoManifest {
        /// The repository.
        repository: String,
    },
    /// Its manifest is malformed.
    #[error("{repository}: {reason}")]
    Manifest {
        /// The repository.
        repository: String,
        /// What is wrong.
        reason: ManifestError,
    },
    /// Its weights are not those of the manifest.
    #[error("{repository} does not hold this model: {reason}")]
    OtherModel {
        /// The repository.
        repository: String,
        /// What differs.
        reason: String,
    },
    /// A file cannot be read.
    #[error("cannot read {file} of {repository}: {reason}")]
    Read {
        /// The repository.
        repository: String,
        /// The file.
        file: String,
        /// Why not.
        reason: SourceError,
    },
}

/// A repository that is asked over HTTP.
#[derive(Debug, Clone)]
pub struct Hub {
    client: Client,
    endpoint: String,
    token: Option<HeaderValue>,
    repository: Repository,
}

/// A hub's repository as a source of one model's weights.
#[derive(Debug)]
pub struct HubSource {
    hub: Hub,
    manifest: Manifest,
    locations: Locations,
}

impl Hub {
    /// A repository behind `endpoint`. The token is sent to the endpoint's host only, never to where it redirects.
    ///
    /// # Errors
    /// `Endpoint`.
    pub fn new(endpoint: &str, token: Option<&str>, repository: Repository) -> Result<Self, RepositoryError> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let wrong = |reason: String| RepositoryError::Endpoint { endpoint: endpoint.clone(), reason };
        let token = token
            .map(|token| {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .map_err(|_| wrong("the token has characters that no token has".to_owned()))?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // Headers that are secret are left out when a redirect leads to another host or port.
            .redirect(reqwest::redirect::Policy::limited(MAX_REDIRECTS))
            .user_agent(concat!("hanse/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| wrong(reason_of(&error)))?;
        Ok(Self { client, endpoint, token, repository })
    }

    /// As `HF_ENDPOINT` and `HF_TOKEN` say.
    ///
    /// # Errors
    /// `Endpoint`.
    pub fn from_env(repository: Repository) -> Result<Self, RepositoryError> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self::new(&endpoint, set("HF_TOKEN").as_deref(), repository)
    }

    /// The repository's own manifest.
    ///
    /// # Errors
    /// `NoManifest`, `Manifest`, `Read`.
    pub async fn manifest(&self) -> Result<(SignedManifest, Locations), RepositoryError> {
        let repository = || self.repository.to_string();
        let text = self.small_file(MANIFEST_FILE, MAX_MANIFEST_BYTES as u64).await?;
        let text = text.ok_or_else(|| RepositoryError::NoManifest { repository: repository() })?;
        let invalid = |reason| RepositoryError::Manifest { repository: repository(), reason };
        let text = String::from_utf8(text.to_vec()).map_err(|e| invalid(ManifestError::Json(e.to_string())))?;
        SignedManifest::from_json(&text).map_err(invalid)
    }

    /// A source of the model's weights, with places that are known.
    #[must_use]
    pub fn source(self, manifest: Manifest, locations: Locations) -> HubSource {
        HubSource { hub: self, manifest, locations }
    }

    /// A source of the model's weights, found by reading the headers of the repository's safetensors files.
    ///
    /// # Errors
    /// `OtherModel`, `Read`.
    pub async fn find(self, manifest: Manifest) -> Result<HubSource, RepositoryError> {
        let other = |reason: String| RepositoryError::OtherModel { repository: self.repository.to_string(), reason };
        let config = self.small_file("config.json", MAX_CONFIG_BYTES as u64).await?;
        if config.as_deref() != Some(manifest.config.as_bytes()) {
            return Err(other("its config.json differs".into()));
        }
        let mut headers = Vec::new();
        for file in self.weight_files().await? {
            let prefix = self.retried(&file, 0..PREFIX).await?;
            let length = prefix.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            if length > MAX_HEADER_BYTES {
                return Err(other(format!("{file} is no safetensors file")));
            }
            let mut header = prefix.to_vec();
            header.extend_from_slice(&self.retried(&file, PREFIX..PREFIX + length).await?);
            headers.push((file, header));
        }
        let map =
            weight_map_of_headers(&manifest.config, headers).map_err(|e: CheckpointError| other(e.to_string()))?;
        let trunk = map.parts.trunk.iter().map(|part| (part.name.as_str(), tensor_dtype(part.dtype)));
        let runs = |part: &ExpertParts| part.runs.iter().map(expert_run).collect::<Vec<_>>();
        let experts = map.parts.experts.iter().map(|part| (part.layer as u32, part.experts, runs(part)));
        let listed = manifest.trunk.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype));
        let layers = manifest.experts.iter().map(|layer| (layer.layer, layer.hashes.len(), layer.runs.clone()));
        if !trunk.eq(listed) || !experts.eq(layers) {
            return Err(other("its tensors have other names or dtypes".into()));
        }
        Ok(HubSource { manifest, locations: locations(&map), hub: self })
    }

    /// The names of the files with weights.
    async fn weight_files(&self) -> Result<Vec<String>, RepositoryError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let Some(index) = self.small_file("model.safetensors.index.json", MAX_HEADER_BYTES).await? else {
            return Ok(vec!["model.safetensors".to_owned()]);
        };
        let other = |reason: String| RepositoryError::OtherModel { repository: self.repository.to_string(), reason };
        let index: Index = serde_json::from_slice(&index).map_err(|error| other(error.to_string()))?;
        let files: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
        if let Some(file) = files.iter().find(|file| file.contains(['/', '\\', '?', '#', '%']) || file.starts_with('.'))
        {
            return Err(other(format!("its index names {file:?}, which is no plain file name")));
        }
        Ok(files.into_iter().collect())
    }

    fn read_error(&self, file: &str, reason: SourceError) -> RepositoryError {
        RepositoryError::Read { repository: self.repository.to_string(), file: file.to_owned(), reason }
    }

    /// All of a small file; `None` if there is none.
    async fn small_file(&self, file: &str, limit: u64) -> Result<Option<Bytes>, RepositoryError> {
        let found = retry(async || {
            let response = match self.get(file, None).await {
                Ok(response) => response,
                Err(SourceError::NotHere) => return Ok(None),
                Err(error) => return Err(error),
            };
            take(response, 0, None, limit).await.map(Some)
        });
        found.await.map_err(|error| self.read_error(file, error))
    }

    async fn retried(&self, file: &str, range: Range<u64>) -> Result<Bytes, RepositoryError> {
        retry(async || self.range(file, range.clone()).await).await.map_err(|error| self.read_error(file, error))
    }
}

impl HubSource {
    /// Where an item lies: file, first byte, bytes.
    fn runs(&self, item: &Item) -> Option<Vec<(&str, u64, u64)>> {
        let file = |(file, _): &Place| self.locations.files.get(*file as usize).map(String::as_str);
        match &item.what {
            What::File(name) => {
                let found = self.manifest.files.iter().find(|file| file.name == *name)?;
                Some(vec![(found.name.as_str(), 0, item.blob.bytes)])
            }
            What::Trunk(name) => {
                let at = self.manifest.trunk.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
                let place = self.locations.trunk.get(at)?;
                Some(vec![(file(place)?, place.1, item.blob.bytes)])
            }
            What::Expert { layer, expert } => {
                let at = self.manifest.experts.binary_search_by_key(layer, |layer| layer.layer).ok()?;
                let parts = self.manifest.experts.get(at)?;
                let places = self.locations.experts.get(at)?.get(*expert as usize)?;
                let run = |(place, run): (&Place, &ExpertRun)| Some((file(place)?, place.1, run.bytes()));
                places.iter().zip(&parts.runs).map(run).collect()
            }
        }
    }
}

impl Source for HubSource {
    fn name(&self) -> String {
        self.hub.repository.to_string()
    }

    fn parallel(&self) -> usize {
        PARALLEL
    }

    fn read<'a>(&'a self, item: &'a Item, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            let runs = self.runs(item).ok_or(SourceError::NotHere)?;
            let mut data = BytesMut::new();
            let mut at = 0;
            for (file, offset, bytes) in runs {
                let (start, end) = (range.start.max(at), range.end.min(at + bytes));
                if start < end {
                    let from = offset.saturating_add(start - at);
                    data.extend_from_slice(&self.hub.range(file, from..from.saturating_add(end - start)).await?);
                }
                at += bytes;
            }
            if data.len() as u64 == range.end - range.start { Ok(data.freeze()) } else { Err(SourceError::NotHere) }
        }
        .boxed()
    }

    fn tree<'a>(&'a self, _: &'a Item) -> BoxFuture<'a, Result<Option<Bytes>, SourceError>> {
        async { Ok(None) }.boxed()
    }
}
