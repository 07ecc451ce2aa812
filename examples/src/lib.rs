//! Short programs against the public API lie beside this folder; see `README.md` there.
//!
//! Here is what is too long for one of them: checkpoints with random weights.

pub mod random_checkpoint;
