//! The memory for keys and values: what sequences use, and what is kept of those that have ended, for others that begin alike.

use hanse_model::KvCache;

/// Shorter common beginnings are computed again.
const SHORTEST: usize = 16;
/// Beginnings that are kept at most, so that looking through them takes no time.
const MOST: usize = 256;

/// A sequence that has ended, or a part of it.
struct Kept {
    tokens: Vec<u32>,
    cache: KvCache,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("tokens", &self.tokens.len()).finish()
    }
}

/// Caches of sequences that have ended, the latest used last.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    kept: Vec<Kept>,
}

impl Prefixes {
    /// A copy of the longest beginning that is kept of `tokens`, at most `longest` of them.
    pub(super) fn find(&mut self, tokens: &[u32], longest: usize) -> Option<KvCache> {
        let length = |kept: &Kept| common(&kept.tokens, tokens).min(longest);
        let (index, length) = self
            .kept
            .iter()
            .enumerate()
            .map(|(index, kept)| (index, length(kept)))
            .max_by_key(|(_, length)| *length)?;
        if length < SHORTEST {
            return None;
        }
        let kept = self.kept.remove(index);
        let cache = kept.cache.prefix(length);
        self.kept.push(kept);
        Some(cache)
    }

    /// Keeps a cache of the beginning of `tokens`, and drops those that it makes superfluous.
    pub(super) fn keep(&mut self, tokens: &[u32], cache: KvCache) {
        let tokens = &tokens[..cache.len().min(tokens.len())];
        if tokens.len() < SHORTEST || self.kept.iter().any(|kept| kept.tokens.starts_with(tokens)) {
            return;
        }
        self.kept.retain(|kept| !tokens.starts_with(&kept.tokens));
        if self.kept.len() == MOST {
            self.kept.remove(0);
        }
        self.kept.push(Kept { tokens: tokens.to_vec(), cache });
    }

    /// Drops what was not used for longest until no more than `bytes` are kept.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        let mut used: usize = self.kept.iter().map(|kept| kept.cache.bytes()).sum();
        let superfluous = self.kept.iter().take_while(|kept| {
            let fits = used <= bytes;
            used -= kept.cache.bytes();
            !fits
        });
        let superfluous = superfluous.count();
        self.kept.drain(..superfluous);
    }
}

/// How many tokens two sequences have in common at their beginning.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
