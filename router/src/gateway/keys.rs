//! Who may ask: keys from a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Gateway;
use super::error::ApiError;

/// A file of keys is no longer than this.
const MAX_BYTES: u64 = 1 << 20;

/// API keys. They are kept as hashes, which also compare in constant time.
#[derive(Clone)]
pub struct Keys(Arc<[blake3::Hash]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// There is no key in it, so that nobody could ask.
    #[error("{} has no key: write one on each line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Keys {
    /// Reads a file with a key on each line; empty lines and those that begin with `#` are left out.
    ///
    /// # Errors
    /// If it cannot be read or has no key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let read = || -> std::io::Result<String> {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut std::io::Read::take(std::fs::File::open(path)?, MAX_BYTES), &mut text)?;
            Ok(text)
        };
        let text = read().map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Arc<[_]> = lines.map(|key| blake3::hash(key.as_bytes())).collect();
        if keys.is_empty() {
            return Err(KeyError::Empty { path: path.to_owned() });
        }
        Ok(Self(keys))
    }

    fn contains(&self, key: &str) -> bool {
        let hash = blake3::hash(key.as_bytes());
        // All are compared, however early one is right.
        self.0.iter().fold(false, |found, key| (*key == hash) | found)
    }
}

/// Lets only those through who have a key, if keys are asked for.
pub(super) async fn check(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    if let Some(keys) = &gateway.config.keys {
        let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key =
            header.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        if !key.is_some_and(|(_, key)| keys.contains(key.trim())) {
            return ApiError::no_key().into_response();
        }
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_on_each_line_and_a_file_without_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, "# for the lab\n  secret-1\n\nsecret-2\n").unwrap();
        let keys = Keys::load(&path).unwrap();
        assert!(keys.contains("secret-1") && keys.contains("secret-2"));
        assert!(!keys.contains("# for the lab") && !keys.contains("") && !keys.contains("secret"));
        assert_eq!(format!("{keys:?}"), "Keys(2)", "no key is shown");
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(matches!(Keys::load(&path), Err(KeyError::Empty { .. })));
        assert!(matches!(Keys::load(dir.path()), Err(KeyError::Read { .. })));
    }
}
