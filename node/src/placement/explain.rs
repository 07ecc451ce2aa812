//! Why experts were chosen, for people.

use std::collections::BTreeMap;

use super::{TARGET_REPLICAS, View};

/// What speaks for hosting some experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Some have no replica.
    Missing,
    /// Some have fewer replicas than is safe.
    Rare,
    /// They are more wanted than the average expert.
    Wanted,
    /// There is room for them.
    Spare,
}

/// Chosen experts of one layer that were chosen for the same reason.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// The layer.
    pub layer: u32,
    /// Its experts, ascending.
    pub experts: Vec<u32>,
    /// Bytes of all of them.
    pub bytes: u64,
    /// The fewest replicas that one of them has in the view.
    pub replicas: u32,
    /// Their demand, as a multiple of the average expert's.
    pub demand: f64,
    /// Why.
    pub reason: Reason,
}

/// Sorts a choice by layer and reason.
#[must_use]
pub fn explain(view: &View, chosen: &[(u32, u32)]) -> Vec<Part> {
    let demand = view.demand();
    let mut parts: BTreeMap<(u32, Reason), (Part, f64)> = BTreeMap::new();
    for &(layer, expert) in chosen {
        let Some(index) = view.table().index(layer, expert) else { continue };
        let replicas = view.hosted()[index] + view.coming()[index];
        let reason = match replicas {
            0 => Reason::Missing,
            few if few < TARGET_REPLICAS => Reason::Rare,
            _ if demand[index] > 1.25 => Reason::Wanted,
            _ => Reason::Spare,
        };
        let part = Part { layer, experts: Vec::new(), bytes: 0, replicas, demand: 0.0, reason };
        let (part, sum) = parts.entry((layer, reason)).or_insert((part, 0.0));
        part.experts.push(expert);
        part.bytes += view.table().bytes(&[(layer, expert)]);
        part.replicas = part.replicas.min(replicas);
        *sum += demand[index];
        part.demand = *sum / part.experts.len() as f64;
    }
    parts.into_values().map(|(part, _)| part).collect()
}
