//! The name of a model: a hash over its configuration and weights.

use std::fmt;
use std::str::FromStr;

/// The digest that names a model: equal ids mean the same configuration and the same weights.
///
/// Written as 64 lower-case hex digits; `Debug` shows the first 8.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(pub [u8; 32]);

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelId({}..)", hex::encode(&self.0[..4]))
    }
}

/// The text is not 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a model id is 64 hex digits, not {0:?}")]
pub struct ParseModelIdError(String);

impl FromStr for ModelId {
    type Err = ParseModelIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut id = [0; 32];
        hex::decode_to_slice(text, &mut id).map_err(|_| ParseModelIdError(text.chars().take(80).collect()))?;
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_id_survives_its_text_form() {
        let id = ModelId(std::array::from_fn(|i| i as u8));
        assert_eq!(id.to_string().len(), 64);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(format!("{id:?}"), "ModelId(00010203..)");
    }

    #[test]
    fn text_that_is_no_model_id_is_refused() {
        for text in ["", "00", &"0".repeat(63), &"g".repeat(64), &"0".repeat(66)] {
            assert!(text.parse::<ModelId>().is_err(), "{text}");
        }
    }
}
