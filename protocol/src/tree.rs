//! Parts of a blob checked one by one against the blob's hash.
//!
//! BLAKE3 is a tree. The chaining values of its subtrees of [`GROUP_BYTES`] bytes merge to the root, which is the hash; so
//! whoever has the list of them, and has merged it once, can check each group as it comes, from whomever it comes.

use std::fmt;
use std::str::FromStr;

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

/// Bytes of a group; the last one of a blob may be shorter.
pub const GROUP_BYTES: u64 = 1 << 20;
/// Bytes of a chaining value.
pub const CHAINING_VALUE_BYTES: u64 = 32;

/// The BLAKE3 hash of a blob, which is also its name. Written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobHash(pub [u8; 32]);

impl BlobHash {
    /// The hash of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobHash({}..)", hex::encode(&self.0[..4]))
    }
}

/// The text is not 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a hash is 64 hex digits, not {0:?}")]
pub struct ParseHashError(String);

impl FromStr for BlobHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).map_err(|_| ParseHashError(text.chars().take(80).collect()))?;
        Ok(Self(hash))
    }
}

/// How many groups a blob of `bytes` bytes has; at least one.
#[must_use]
pub fn group_count(bytes: u64) -> u64 {
    bytes.div_ceil(GROUP_BYTES).max(1)
}

/// The groups' chaining values of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupTree {
    bytes: u64,
    hash: BlobHash,
    /// Empty where there is only one group, which has the hash itself.
    values: Vec<[u8; 32]>,
}

impl GroupTree {
    /// The tree of a blob that has only one group: nothing needs to be known but its hash. `None` for a larger blob.
    #[must_use]
    pub fn single(hash: BlobHash, bytes: u64) -> Option<Self> {
        (group_count(bytes) == 1).then(|| Self { bytes, hash, values: Vec::new() })
    }

    /// Believes a list of chaining values, one after another, only if it has one for each group and merges to `hash`.
    #[must_use]
    pub fn verified(hash: BlobHash, bytes: u64, list: &[u8]) -> Option<Self> {
        if let Some(single) = Self::single(hash, bytes) {
            return list.is_empty().then_some(single);
        }
        let (values, rest) = list.as_chunks::<32>();
        if !rest.is_empty() || values.len() as u64 != group_count(bytes) || merge_root(values, bytes) != hash {
            return None;
        }
        Some(Self { bytes, hash, values: values.to_vec() })
    }

    /// The blob's hash.
    #[must_use]
    pub fn hash(&self) -> BlobHash {
        self.hash
    }

    /// The list that [`GroupTree::verified`] takes; empty for a blob of one group.
    #[must_use]
    pub fn list(&self) -> &[u8] {
        self.values.as_flattened()
    }

    /// Whether `data` is group number `group` of the blob.
    #[must_use]
    pub fn fits(&self, group: u64, data: &[u8]) -> bool {
        let Some(start) = group.checked_mul(GROUP_BYTES).filter(|start| *start < self.bytes) else { return false };
        if data.len() as u64 != GROUP_BYTES.min(self.bytes - start) {
            return false;
        }
        if self.values.is_empty() {
            return BlobHash::of(data) == self.hash;
        }
        self.values.get(group as usize).is_some_and(|value| chaining_value(start, data) == *value)
    }
}

/// Makes a [`GroupTree`] of bytes that come in order.
#[derive(Debug, Default)]
pub struct TreeBuilder {
    values: Vec<[u8; 32]>,
    first: Vec<u8>,
    group: Hasher,
    in_group: u64,
    bytes: u64,
}

impl TreeBuilder {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next bytes.
    pub fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.in_group == GROUP_BYTES {
                self.end_group();
            }
            let room = (GROUP_BYTES - self.in_group).min(data.len() as u64) as usize;
            let (now, rest) = data.split_at(room);
            if self.bytes < GROUP_BYTES {
                // A blob of one group is hashed as a whole, and it is not known yet whether there are more.
                self.first.extend_from_slice(now);
            }
            self.group.update(now);
            self.in_group += room as u64;
            self.bytes += room as u64;
            data = rest;
        }
    }

    fn end_group(&mut self) {
        self.values.push(self.group.finalize_non_root());
        self.first = Vec::new();
        self.group = Hasher::new();
        self.group.set_input_offset(self.bytes);
        self.in_group = 0;
    }

    /// The tree of all bytes.
    #[must_use]
    pub fn finish(mut self) -> GroupTree {
        if self.values.is_empty() {
            return GroupTree { bytes: self.bytes, hash: BlobHash::of(&self.first), values: Vec::new() };
        }
        self.values.push(self.group.finalize_non_root());
        GroupTree { bytes: self.bytes, hash: merge_root(&self.values, self.bytes), values: self.values }
    }
}

fn chaining_value(start: u64, data: &[u8]) -> [u8; 32] {
    Hasher::new().set_input_offset(start).update(data).finalize_non_root()
}

/// At least two values, as many as there are groups.
fn merge_root(values: &[[u8; 32]], bytes: u64) -> BlobHash {
    let left = left_subtree_len(bytes);
    let (first, second) = values.split_at((left / GROUP_BYTES) as usize);
    BlobHash(*merge_subtrees_root(&merge(first, left), &merge(second, bytes - left), Mode::Hash).as_bytes())
}

fn merge(values: &[[u8; 32]], bytes: u64) -> [u8; 32] {
    if let [value] = values {
        return *value;
    }
    let left = left_subtree_len(bytes);
    let (first, second) = values.split_at((left / GROUP_BYTES) as usize);
    merge_subtrees_non_root(&merge(first, left), &merge(second, bytes - left), Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    #[test]
    fn groups_merge_to_the_hash_of_the_whole_at_every_kind_of_length() {
        let group = GROUP_BYTES as usize;
        for bytes in [0, 1, 1023, group - 1, group, group + 1, 2 * group, 2 * group + 5, 3 * group, 5 * group + 1024] {
            let data = noise(bytes);
            let mut builder = TreeBuilder::new();
            for part in data.chunks(100_003) {
                builder.update(part);
            }
            let tree = builder.finish();
            assert_eq!(tree.hash(), BlobHash::of(&data), "{bytes}");
            let again = GroupTree::verified(tree.hash(), bytes as u64, tree.list());
            assert_eq!(again.as_ref(), Some(&tree), "{bytes}");
            for (number, part) in data.chunks(group).enumerate() {
                assert!(tree.fits(number as u64, part), "{bytes}: {number}");
                let mut wrong = part.to_vec();
                *wrong.last_mut().unwrap() ^= 1;
                assert!(!tree.fits(number as u64, &wrong), "{bytes}: {number}");
                assert!(!tree.fits(number as u64 + 1, part) || bytes == 0);
                assert!(!tree.fits(number as u64, &part[..part.len() - 1]));
            }
        }
    }

    #[test]
    fn a_list_that_does_not_merge_to_the_hash_is_not_believed() {
        let bytes = 3 * GROUP_BYTES;
        let mut builder = TreeBuilder::new();
        builder.update(&noise(bytes as usize));
        let tree = builder.finish();
        let mut list = tree.list().to_vec();
        assert!(GroupTree::verified(tree.hash(), bytes, &list[..64]).is_none());
        assert!(GroupTree::verified(tree.hash(), bytes + GROUP_BYTES, &list).is_none());
        assert!(GroupTree::verified(tree.hash(), bytes, &[]).is_none());
        list[40] ^= 1;
        assert!(GroupTree::verified(tree.hash(), bytes, &list).is_none());
    }
}
