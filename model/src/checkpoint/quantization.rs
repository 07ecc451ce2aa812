//! What `config.json` says of how weights are quantised: what is not read is refused by name, before tensors are looked for.

use serde_json::Value;

use super::config::{Config, ConfigError};
use crate::linear::FP8_TILE;

/// What `hanse quantize` writes as `quant_method`.
pub(crate) const HANSE: &str = "hanse";
/// The key under which it names the model that it read.
pub(crate) const ORIGINAL: &str = "of";

/// The published model of which `hanse quantize` made this one, by its model id in hexadecimal digits.
pub(super) fn original(config: &Config<'_>) -> Result<Option<String>, ConfigError> {
    let Some(quantization) = config.object("quantization_config")? else { return Ok(None) };
    let Some(id) = quantization.text(ORIGINAL)? else { return Ok(None) };
    if id.len() != 64 || !id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(quantization.invalid(ORIGINAL, "a model id has 64 hexadecimal digits"));
    }
    Ok(Some(id.to_owned()))
}

/// Refuses methods that are not read, and blocks of other sizes.
pub(super) fn check(config: &Config<'_>) -> Result<(), ConfigError> {
    let Some(quantization) = config.object("quantization_config")? else { return Ok(()) };
    match quantization.text("quant_method")? {
        Some("mxfp4") => Ok(()),
        Some(HANSE) => original(config).map(|_| ()),
        Some("fp8") => {
            let sizes = quantization.list("weight_block_size")?.unwrap_or_default();
            if !sizes.iter().map(Value::as_u64).eq([Some(FP8_TILE as u64); 2]) {
                let reason = format!("fp8 weights are read with scales of blocks of [{FP8_TILE}, {FP8_TILE}] only");
                return Err(quantization.invalid("weight_block_size", reason));
            }
            if quantization.text("fmt")?.is_some_and(|format| format != "e4m3") {
                return Err(quantization.invalid("fmt", "fp8 weights are read as e4m3 only"));
            }
            Ok(())
        }
        _ => {
            Err(quantization.invalid("quant_method", "weights are read that are quantised by fp8, mxfp4 or hanse only"))
        }
    }
}
