//! Short programs against the public API are in `src/bin`; see `README.md` beside this folder.
//!
//! Here is what is too long for one of them: checkpoints with random weights.

pub mod random_checkpoint;
