//! How a repository is named.

use std::str::FromStr;

/// A repository: `hf:org/name` or `hf:org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// Owner and name.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
}

/// The text names no repository.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no repository: write hf:org/name or hf:org/name@revision")]
pub struct ParseRepositoryError(String);

impl FromStr for Repository {
    type Err = ParseRepositoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseRepositoryError(text.chars().take(120).collect());
        let rest = text.strip_prefix("hf:").ok_or_else(wrong)?;
        let (repo, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(plain);
        let parts: Vec<&str> = repo.split('/').collect();
        // Slashes are allowed in a revision, such as refs/pr/1.
        if !(1..=2).contains(&parts.len()) || !parts.into_iter().all(part) || !revision.split('/').all(part) {
            return Err(wrong());
        }
        Ok(Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hf:{}@{}", self.repo, self.revision)
    }
}
