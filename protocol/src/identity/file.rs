//! The identity file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{Identity, IdentityError};

/// Length of the file: libp2p's protobuf encoding of an Ed25519 private key.
pub(super) const FILE_BYTES: usize = 68;

pub(super) fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
    if let Some(identity) = load(path)? {
        return Ok(identity);
    }
    create(path)?;
    // Another process may have been quicker: what counts is what lies there now.
    load(path)?.ok_or_else(|| failed("read", path)(io::ErrorKind::NotFound.into()))
}

fn load(path: &Path) -> Result<Option<Identity>, IdentityError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    // Asked of the open file, not of the path, so that it cannot be exchanged in between.
    let metadata = file.metadata().map_err(failed("read", path))?;
    let not_a_key = |reason: String| IdentityError::NotAKey { path: path.into(), reason };
    if !metadata.is_file() {
        return Err(not_a_key("it is not a regular file".into()));
    }
    check_mode(path, &metadata)?;
    if metadata.len() != FILE_BYTES as u64 {
        return Err(not_a_key(format!("it has {} bytes, not {FILE_BYTES}", metadata.len())));
    }
    let mut bytes = [0; FILE_BYTES];
    file.read_exact(&mut bytes).map_err(failed("read", path))?;
    Identity::from_protobuf(&bytes).map(Some).map_err(not_a_key)
}

/// Writes a new key beside `path` and then links it there, which fails if something is there already.
fn create(path: &Path) -> Result<(), IdentityError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).map_err(failed("create the folder of", path))?;
    let identity = Identity::generate();
    // The new peer id makes the name unique.
    let temporary = folder.join(format!(".identity-{}", identity.peer_id()));
    let written = write_new(&temporary, &identity.to_protobuf()).and_then(|()| fs::hard_link(&temporary, path));
    let removed = fs::remove_file(&temporary);
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed("create", path)(error)),
        Ok(()) => removed.and_then(|()| sync_folder(folder)).map_err(failed("create", path)),
    }
}

fn write_new(path: &PathBuf, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn check_mode(path: &Path, metadata: &fs::Metadata) -> Result<(), IdentityError> {
    let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.into(), mode });
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_mode(_path: &Path, _metadata: &fs::Metadata) -> Result<(), IdentityError> {
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    move |source| IdentityError::Io { action, path: path.into(), source }
}
