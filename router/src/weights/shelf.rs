//! What a member gives out of a model: its manifest, and the blobs that lie in its folder or its cache.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use hanse_protocol::{
    Blob, BlobHash, CHAINING_VALUE_BYTES, ExpertRun, GROUP_BYTES, GroupTree, Locations, MAX_CHUNK_BYTES, ModelId,
    SignedManifest, TreeBuilder, Wanted,
};

use super::cache::Cache;
use super::source::Item;

/// Trees kept in memory: 32 bytes for each mebibyte of their blobs.
const MAX_TREES: usize = 1024;

/// Bytes in a file.
#[derive(Debug, Clone, Copy)]
struct Run {
    file: usize,
    offset: u64,
    bytes: u64,
}

/// A model's bytes as far as this member has them.
#[derive(Debug)]
pub struct Shelf {
    signed: SignedManifest,
    encoded: Bytes,
    /// Length of each blob, and where it lies in `files`; nothing where it may lie in the cache.
    blobs: HashMap<BlobHash, (u64, Vec<Run>)>,
    files: Vec<File>,
    cache: Option<Cache>,
    trees: Mutex<HashMap<BlobHash, Arc<GroupTree>>>,
}

/// Why something is not given out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShelfError {
    /// It is not here.
    #[error("it is not here")]
    NotHere,
    /// What was asked for does not lie within the whole, or not within one group.
    #[error("{0}")]
    BadRange(&'static str),
    /// The bytes here are not what the manifest says, and are not given to anyone.
    #[error("the bytes here are damaged")]
    Damaged,
    /// The system's fault.
    #[error("cannot read the weights")]
    Io(#[from] std::io::Error),
}

impl Shelf {
    /// All of a model folder.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub fn of_folder(signed: SignedManifest, locations: &Locations, dir: &Path) -> std::io::Result<Self> {
        let mut files = locations.files.iter().map(|name| File::open(dir.join(name))).collect::<Result<Vec<_>, _>>()?;
        let manifest = signed.manifest();
        let mut blobs = HashMap::new();
        for (tensor, (file, offset)) in manifest.trunk.iter().zip(&locations.trunk) {
            let bytes = tensor.blob().bytes;
            blobs.insert(tensor.hash, (bytes, vec![Run { file: *file as usize, offset: *offset, bytes }]));
        }
        for (layer, places) in manifest.experts.iter().zip(&locations.experts) {
            for (hash, places) in layer.hashes.iter().zip(places) {
                let run = |(place, run): (&(u32, u64), &ExpertRun)| Run {
                    file: place.0 as usize,
                    offset: place.1,
                    bytes: run.bytes(),
                };
                let runs = places.iter().zip(&layer.runs).map(run).collect();
                blobs.insert(*hash, (layer.expert_bytes(), runs));
            }
        }
        for file in &manifest.files {
            // The tokenizer may be missing in a volunteer's folder.
            let Ok(opened) = File::open(dir.join(&file.name)) else { continue };
            let run = Run { file: files.len(), offset: 0, bytes: file.blob.bytes };
            blobs.insert(file.blob.hash, (file.blob.bytes, vec![run]));
            files.push(opened);
        }
        Ok(Self::new(signed, blobs, files, None))
    }

    /// What is in the cache now, and what will be.
    #[must_use]
    pub fn of_cache(signed: SignedManifest, cache: Cache) -> Self {
        let manifest = signed.manifest();
        let mut blobs: HashMap<_, _> =
            Item::trunk_of(manifest).into_iter().map(|item| (item.blob.hash, (item.blob.bytes, Vec::new()))).collect();
        for layer in &manifest.experts {
            let bytes = layer.expert_bytes();
            blobs.extend(layer.hashes.iter().map(|hash| (*hash, (bytes, Vec::new()))));
        }
        Self::new(signed, blobs, Vec::new(), Some(cache))
    }

    fn new(
        signed: SignedManifest,
        blobs: HashMap<BlobHash, (u64, Vec<Run>)>,
        files: Vec<File>,
        cache: Option<Cache>,
    ) -> Self {
        let encoded = signed.encode().into();
        Self { signed, encoded, blobs, files, cache, trees: Mutex::default() }
    }

    /// The model's id.
    #[must_use]
    pub fn model(&self) -> ModelId {
        self.signed.id()
    }

    /// Whether everything is here that a client keeps: the trunk and the small files.
    #[must_use]
    pub fn has_trunk(&self) -> bool {
        Item::trunk_of(self.signed.manifest()).iter().all(|item| match self.blobs.get(&item.blob.hash) {
            Some((_, runs)) if runs.is_empty() => self.cache.as_ref().is_some_and(|cache| cache.has(&item.blob)),
            Some(_) => true,
            None => false,
        })
    }

    /// Bytes of what was asked for, and the length of the whole. Reads from disk, and the first time all of the blob.
    ///
    /// # Errors
    /// [`ShelfError`], as its variants say. Bytes that are not as the manifest says are never given.
    pub fn read(&self, wanted: Wanted, offset: u64, length: u32) -> Result<(u64, Bytes), ShelfError> {
        let length = u64::from(length.min(MAX_CHUNK_BYTES));
        match wanted {
            Wanted::Manifest => cut(&self.encoded, offset, length),
            Wanted::Tree(hash) => {
                let tree = self.tree(hash)?;
                // The only group of a small blob has the blob's hash.
                let list = if tree.list().is_empty() { &hash.0[..] } else { tree.list() };
                debug_assert_eq!(list.len() as u64 % CHAINING_VALUE_BYTES, 0);
                cut(&Bytes::copy_from_slice(list), offset, length)
            }
            Wanted::Blob(hash) => {
                let reader = self.reader(hash)?;
                let (group, within) = (offset / GROUP_BYTES, offset % GROUP_BYTES);
                let start = group * GROUP_BYTES;
                if offset >= reader.blob.bytes || within + length > GROUP_BYTES {
                    return Err(ShelfError::BadRange("it lies beyond the end, or not within one group"));
                }
                let tree = self.tree(hash)?;
                let mut data = vec![0; GROUP_BYTES.min(reader.blob.bytes - start) as usize];
                reader.read(start, &mut data)?;
                if !tree.fits(group, &data) {
                    return Err(ShelfError::Damaged);
                }
                let data = Bytes::from(data);
                let end = (within + length).min(data.len() as u64);
                Ok((reader.blob.bytes, data.slice(within as usize..end as usize)))
            }
        }
    }

    fn tree(&self, hash: BlobHash) -> Result<Arc<GroupTree>, ShelfError> {
        if let Some(tree) = self.trees.lock().unwrap_or_else(PoisonError::into_inner).get(&hash) {
            return Ok(tree.clone());
        }
        let reader = self.reader(hash)?;
        let mut builder = TreeBuilder::new();
        let mut buffer = vec![0; GROUP_BYTES.min(reader.blob.bytes) as usize];
        while builder.bytes() < reader.blob.bytes {
            let step = GROUP_BYTES.min(reader.blob.bytes - builder.bytes());
            let data = &mut buffer[..step as usize];
            reader.read(builder.bytes(), data)?;
            builder.update(data);
        }
        let tree = Arc::new(builder.finish());
        if tree.hash() != hash {
            return Err(ShelfError::Damaged);
        }
        let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        if trees.len() >= MAX_TREES {
            // Whichever: it is computed again when it is wanted.
            trees.clear();
        }
        trees.insert(hash, tree.clone());
        Ok(tree)
    }

    fn reader(&self, hash: BlobHash) -> Result<Reader<'_>, ShelfError> {
        let (bytes, runs) = self.blobs.get(&hash).ok_or(ShelfError::NotHere)?;
        let blob = Blob { hash, bytes: *bytes };
        if !runs.is_empty() {
            return Ok(Reader { blob, from: From::Folder(&self.files, runs) });
        }
        let cached = self.cache.as_ref().and_then(|cache| cache.open(&blob).ok().flatten());
        cached.map(|opened| Reader { blob, from: From::Cache(opened.file) }).ok_or(ShelfError::NotHere)
    }
}

enum From<'a> {
    Folder(&'a [File], &'a [Run]),
    Cache(File),
}

struct Reader<'a> {
    blob: Blob,
    from: From<'a>,
}

impl Reader<'_> {
    /// Fills `to` from byte `offset` of the blob on.
    fn read(&self, offset: u64, to: &mut [u8]) -> std::io::Result<()> {
        let (files, runs) = match &self.from {
            From::Cache(file) => return file.read_exact_at(to, offset),
            From::Folder(files, runs) => (files, runs),
        };
        let (mut at, mut filled) = (0, 0);
        for run in *runs {
            let wanted = offset + filled as u64;
            if wanted < at + run.bytes && filled < to.len() {
                let skip = wanted - at;
                let step = (run.bytes - skip).min((to.len() - filled) as u64) as usize;
                let file = files.get(run.file).ok_or(std::io::ErrorKind::NotFound)?;
                file.read_exact_at(&mut to[filled..filled + step], run.offset + skip)?;
                filled += step;
            }
            at += run.bytes;
        }
        if filled == to.len() { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    }
}

fn cut(whole: &Bytes, offset: u64, length: u64) -> Result<(u64, Bytes), ShelfError> {
    let total = whole.len() as u64;
    if offset >= total {
        return Err(ShelfError::BadRange("it lies beyond the end"));
    }
    let end = offset.saturating_add(length).min(total);
    Ok((total, whole.slice(offset as usize..end as usize)))
}
