//! The experts of a model, and those that nobody hosts.

use std::collections::BTreeMap;

/// The experts of a model, as far as a router needs to know them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertLayout {
    /// Length of one row of hidden states.
    pub hidden_size: u32,
    /// Number of experts of each MoE layer, by layer number; dense layers are absent.
    pub layers: BTreeMap<u32, u32>,
}

/// Experts that no peer hosts, by layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing(pub BTreeMap<u32, Vec<u32>>);

impl Missing {
    /// Whether nothing is missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 4;
        for (i, (layer, experts)) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}layer {layer}: {}", ranges(experts))?;
        }
        if self.0.len() > SHOWN {
            write!(f, "; and in {} more layers", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}

/// Ascending numbers as ranges: `0-3,7`.
#[must_use]
pub fn ranges(numbers: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let text: Vec<String> =
        parts.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    text.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_experts_read_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(ranges(&[]), "");
        let missing = Missing((0..6).map(|layer| (layer, vec![1, 2])).collect());
        assert_eq!(missing.to_string(), "layer 0: 1-2; layer 1: 1-2; layer 2: 1-2; layer 3: 1-2; and in 2 more layers");
    }
}
