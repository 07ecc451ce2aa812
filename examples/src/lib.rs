//! Short programs against the public API.
