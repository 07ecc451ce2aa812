//! What the tests across crates share: reference cases, volunteers in this process, peers and strangers that misbehave.
//!
//! Everything here panics when something is not as it should be: that is a failed test.

pub mod browser;
pub mod cases;
pub mod fake;
pub mod givers;
pub mod net;
/// Reading the reference cases: the same code as in the tests of `hanse-model`.
#[path = "../../model/tests/common/mod.rs"]
pub mod reference;
pub mod served;
pub mod stranger;
