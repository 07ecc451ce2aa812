//! `--experts SPEC`: which experts to host, as a person writes it.

use std::ops::RangeInclusive;
use std::str::FromStr;

use hanse_router::ExpertLayout;

/// `all`, `none`, or layers and experts such as `0-3:0-31,5:7,9`. Without experts, all of the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertsSpec {
    /// Every expert of every MoE layer.
    All,
    /// No expert: a member that others join through and that relays for those behind home routers.
    None,
    /// Layers, each with the experts wanted in it (`None`: all).
    Some(Vec<(RangeInclusive<u32>, Option<RangeInclusive<u32>>)>),
}

/// Why a spec cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpertsSpecError {
    /// It is not written as it should be.
    #[error("{0:?} is not `all`, `none` or a list such as 0-3:0-31,5:7")]
    Syntax(String),
    /// It names a layer that the model does not have.
    #[error("layer {layer} does not exist: the model's MoE layers are {known}")]
    NoSuchLayer {
        /// The layer.
        layer: u32,
        /// The layers that have experts.
        known: String,
    },
    /// It names a single layer that has no experts.
    #[error("layer {layer} is dense and has no experts: the model's MoE layers are {known}")]
    DenseLayer {
        /// The layer.
        layer: u32,
        /// The layers that have experts.
        known: String,
    },
    /// It names an expert that the layer does not have.
    #[error("layer {layer} has no expert {expert}: its experts are 0-{last}")]
    NoSuchExpert {
        /// The layer.
        layer: u32,
        /// The expert.
        expert: u32,
        /// The layer's last expert.
        last: u32,
    },
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
}

fn range(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = number(first)?..=number(last)?;
    (!range.is_empty()).then_some(range)
}

impl FromStr for ExpertsSpec {
    type Err = ExpertsSpecError;

    fn from_str(text: &str) -> Result<Self, ExpertsSpecError> {
        match text {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let item = |part: &str| match part.split_once(':') {
            Some((layers, experts)) => Some((range(layers)?, Some(range(experts)?))),
            None => Some((range(part)?, None)),
        };
        let items: Option<Vec<_>> = text.split(',').map(item).collect();
        items.map(Self::Some).ok_or_else(|| ExpertsSpecError::Syntax(text.to_owned()))
    }
}

impl ExpertsSpec {
    /// The (layer, expert) pairs meant, ascending, each once. A range may pass over dense layers.
    ///
    /// # Errors
    /// A layer or expert that the model does not have.
    pub fn resolve(&self, layout: &ExpertLayout, layers: u32) -> Result<Vec<(u32, u32)>, ExpertsSpecError> {
        let mut wanted = std::collections::BTreeSet::new();
        let everything;
        let items = match self {
            Self::All => {
                everything = vec![(0..=layers.saturating_sub(1), None)];
                &everything
            }
            Self::None => return Ok(Vec::new()),
            Self::Some(items) => items,
        };
        let known = || hanse_router::directory::ranges(&layout.layers.keys().copied().collect::<Vec<_>>());
        for (layer_range, expert_range) in items {
            let last_layer = *layer_range.end();
            if last_layer >= layers {
                return Err(ExpertsSpecError::NoSuchLayer { layer: last_layer, known: known() });
            }
            let single = layer_range.start() == layer_range.end();
            for layer in layer_range.clone() {
                let Some(&experts) = layout.layers.get(&layer) else {
                    if single {
                        return Err(ExpertsSpecError::DenseLayer { layer, known: known() });
                    }
                    continue;
                };
                let last = experts.saturating_sub(1);
                let range = expert_range.clone().unwrap_or(0..=last);
                if *range.end() > last {
                    return Err(ExpertsSpecError::NoSuchExpert { layer, expert: *range.end(), last });
                }
                wanted.extend(range.map(|expert| (layer, expert)));
            }
        }
        Ok(wanted.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers 0, 1, 3 with 4 experts; layer 2 is dense.
    fn resolve(spec: &str) -> Result<Vec<(u32, u32)>, ExpertsSpecError> {
        let layout = ExpertLayout { hidden_size: 8, layers: [(0, 4), (1, 4), (3, 4)].into() };
        spec.parse::<ExpertsSpec>()?.resolve(&layout, 4)
    }

    #[test]
    fn specs_mean_what_they_say() {
        assert_eq!(resolve("all").unwrap().len(), 12);
        assert_eq!(resolve("0").unwrap(), [(0, 0), (0, 1), (0, 2), (0, 3)]);
        assert_eq!(resolve("0-1:1-2,3:0").unwrap(), [(0, 1), (0, 2), (1, 1), (1, 2), (3, 0)]);
        assert_eq!(resolve("1-3:3").unwrap(), [(1, 3), (3, 3)], "a range passes over dense layers");
        assert_eq!(resolve("3:0,3:0-1").unwrap(), [(3, 0), (3, 1)], "overlaps count once");
    }

    #[test]
    fn what_the_model_does_not_have_is_named() {
        assert!(matches!(resolve("4"), Err(ExpertsSpecError::NoSuchLayer { layer: 4, .. })));
        assert!(matches!(resolve("0-4294967295"), Err(ExpertsSpecError::NoSuchLayer { .. })));
        assert!(matches!(resolve("2"), Err(ExpertsSpecError::DenseLayer { layer: 2, .. })));
        assert!(matches!(resolve("0:2-4"), Err(ExpertsSpecError::NoSuchExpert { layer: 0, expert: 4, last: 3 })));
    }

    #[test]
    fn other_writings_are_refused() {
        for bad in ["", "a", "1-", "3-1", "0:", ":1", "0:1:2", "0,,1", "-1", "+1", "0: 1", "99999999999"] {
            assert!(matches!(resolve(bad), Err(ExpertsSpecError::Syntax(_))), "{bad:?}");
        }
    }
}
