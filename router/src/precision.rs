//! Experts in fewer bits than published: which of them a client accepts, and which stored form of each expert it uses.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use hanse_protocol::{Advert, ModelId, Precision};

/// Which experts a client accepts beside those of its own model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecisionPolicy {
    /// None: every expert as the client's model has it.
    #[default]
    Exact,
    /// Variants of the model with weights of eight bits or more.
    EightBits,
    /// Every variant of the model.
    Any,
}

impl PrecisionPolicy {
    /// Whether a client of `model` calls the author of `advert`.
    #[must_use]
    pub fn accepts(self, advert: &Advert, model: ModelId) -> bool {
        let variants = match self {
            Self::Exact => false,
            Self::EightBits => advert.precision.has_eight_bits(),
            Self::Any => true,
        };
        advert.model == model || (variants && advert.serves(model))
    }
}

/// One way in which some peer stores an expert.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer {
    /// The model of which the peer hosts the expert.
    pub(crate) model: ModelId,
    pub(crate) precision: Precision,
    /// Whether the peer takes calls, as far as is known.
    pub(crate) well: bool,
}

/// For each expert the stored form in use. All peers that are asked for an expert, also again or beside another one, store it in the same form;
/// another is taken only when nobody who is well has the one in use.
#[derive(Debug)]
pub(crate) struct Forms {
    /// The client's own model: its form is preferred to all others.
    model: ModelId,
    used: Mutex<HashMap<(u32, u32), ModelId>>,
}

impl Forms {
    pub(crate) fn new(model: ModelId) -> Self {
        Self { model, used: Mutex::default() }
    }

    /// The form to use for an expert of which there are these offers; `None` if there are none.
    pub(crate) fn choose(&self, layer: u32, expert: u32, offers: &[Offer]) -> Option<ModelId> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let before = used.get(&(layer, expert)).copied();
        let rank = |offer: &&Offer| {
            let kept = Some(offer.model) == before;
            (offer.well, kept, offer.model == self.model, offer.precision, offer.model.0)
        };
        let best = offers.iter().max_by_key(rank)?;
        if before.is_some_and(|before| before != best.model) {
            tracing::warn!(layer, expert, precision = %best.precision, "an expert is computed in another precision from now on");
        }
        used.insert((layer, expert), best.model);
        Some(best.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: ModelId = ModelId([1; 32]);
    const EIGHT: ModelId = ModelId([2; 32]);
    const FOUR: ModelId = ModelId([3; 32]);

    fn offer(model: ModelId, well: bool) -> Offer {
        let precision = match model {
            PUBLISHED => Precision::Bf16,
            EIGHT => Precision::Q8_0,
            _ => Precision::Q4K,
        };
        Offer { model, precision, well }
    }

    #[test]
    fn the_form_in_use_stays_as_long_as_somebody_who_is_well_has_it() {
        let forms = Forms::new(PUBLISHED);
        let choose = |offers: &[(ModelId, bool)]| {
            let offers: Vec<Offer> = offers.iter().map(|(model, well)| offer(*model, *well)).collect();
            forms.choose(0, 7, &offers)
        };
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&[(FOUR, true), (EIGHT, true)]), Some(EIGHT), "the nearest");
        assert_eq!(choose(&[(FOUR, true), (EIGHT, true), (PUBLISHED, true)]), Some(EIGHT), "in use");
        assert_eq!(choose(&[(EIGHT, false), (EIGHT, true), (PUBLISHED, true)]), Some(EIGHT), "another replica is well");
        assert_eq!(choose(&[(EIGHT, false), (FOUR, false)]), Some(EIGHT), "nobody is well");
        assert_eq!(choose(&[(EIGHT, false), (FOUR, true), (PUBLISHED, true)]), Some(PUBLISHED), "the client's own");
        assert_eq!(choose(&[(EIGHT, true), (PUBLISHED, true)]), Some(PUBLISHED));
        assert_eq!(forms.choose(0, 8, &[offer(FOUR, true)]), Some(FOUR), "another expert");
    }
}
