//! Tests across crates: parity, churn, hostile peers.
