//! Rope in `config.json`.

use super::decoder::MAX_POSITIONS;
use crate::checkpoint::config::{Config, ConfigError};
use crate::spec::{RopePairs, RopeScaling, RopeSpec};

/// How much of a head rotates.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rotated {
    /// All of so many values.
    Whole(usize),
    /// `partial_rotary_factor` of so many values, or this factor where the config does not say.
    Part { of: usize, factor: f64 },
}

impl Rotated {
    pub(super) fn head_dim(self) -> usize {
        match self {
            Self::Whole(head_dim) | Self::Part { of: head_dim, .. } => head_dim,
        }
    }

    /// Values that rotate. `plain` rope is not scaled.
    fn dims(self, config: &Config<'_>, rope: Option<&Config<'_>>, plain: bool) -> Result<usize, ConfigError> {
        const KEY: &str = "partial_rotary_factor";
        let owner = rope.filter(|rope| rope.value(KEY).is_some()).unwrap_or(config);
        let partial = owner.positive(KEY)?;
        match self {
            Self::Whole(head_dim) => match partial {
                Some(partial) if partial != 1.0 && plain => {
                    // The reference ignores it too for plain rope, and fails otherwise.
                    tracing::warn!(partial_rotary_factor = partial, "ignored: this family rotates whole heads");
                    Ok(head_dim)
                }
                Some(partial) if partial != 1.0 => Err(owner.invalid(KEY, "this family rotates whole heads")),
                _ => Ok(head_dim),
            },
            Self::Part { of, factor } => {
                let dims = (of as f64 * partial.unwrap_or(factor)) as usize;
                if dims < 2 || dims > of || !dims.is_multiple_of(2) {
                    let reason =
                        format!("it leaves {dims} of a head's {of} values to rotate: they must be even and no more");
                    return Err(owner.invalid(KEY, reason));
                }
                Ok(dims)
            }
        }
    }
}

/// The object that says how rope is scaled.
fn rope_object<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, ConfigError> {
    match config.object("rope_scaling")? {
        Some(scaling) => Ok(Some(scaling)),
        None => config.object("rope_parameters"),
    }
}

/// What scores of latent attention are multiplied by for the sake of scaled rope: the square of what `mscale_all_dim` says.
pub(super) fn score_factor(config: &Config<'_>) -> Result<f32, ConfigError> {
    let Some(rope) = rope_object(config)? else { return Ok(1.0) };
    let is_scaled = rope.text(rope.first(&["rope_type", "type"]))?.is_some_and(|kind| kind != "default");
    let all_dim = rope.number("mscale_all_dim", |v| v >= 0.0, "a finite number, 0 or above")?;
    let Some(all_dim) = all_dim.filter(|all_dim| is_scaled && *all_dim != 0.0) else { return Ok(1.0) };
    Ok(yarn_mscale(rope.positive("factor")?.unwrap_or(1.0), all_dim).powi(2) as f32)
}

/// Reads rope in the classic form (`rope_theta`, `rope_scaling`) or the newer one (`rope_parameters`).
pub(super) fn read_rope(
    config: &Config<'_>,
    default_theta: f64,
    max_positions: usize,
    rotated: Rotated,
) -> Result<RopeSpec, ConfigError> {
    const ABOVE_ONE: &str = "a finite number above 1";
    let outer_theta = config.number("rope_theta", |v| v > 1.0, ABOVE_ONE)?;
    let pairs = RopePairs::Halves;
    let Some(rope) = rope_object(config)? else {
        let (theta, dims) = (outer_theta.unwrap_or(default_theta), rotated.dims(config, None, true)?);
        return Ok(RopeSpec { dims, pairs, theta, scaling: RopeScaling::None });
    };
    if let Some(key) = rope.nested().next() {
        return Err(rope.invalid(key, "rope that differs between kinds of layers is not supported"));
    }
    let theta = rope.number("rope_theta", |v| v > 1.0, ABOVE_ONE)?.or(outer_theta).unwrap_or(default_theta);
    let kind_key = rope.first(&["rope_type", "type"]);
    let kind = rope.text(kind_key)?.unwrap_or("default");
    let dims = rotated.dims(config, Some(&rope), kind == "default")?;
    let original = || -> Result<f64, ConfigError> {
        let outer = config.whole("original_max_position_embeddings", 1, MAX_POSITIONS)?;
        let inner = rope.whole("original_max_position_embeddings", 1, MAX_POSITIONS)?;
        Ok(outer.or(inner).unwrap_or(max_positions) as f64)
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        // Its base changes only beyond `max_position_embeddings`, where no sequence of ours goes.
        "dynamic" => rope.required_positive("factor").map(|_| RopeScaling::None)?,
        "linear" => RopeScaling::Linear { factor: rope.required_positive("factor")? },
        "yarn" => {
            let original_max_positions = original()?;
            let factor = match rope.positive("factor")? {
                Some(factor) => factor,
                None if rope.has("factor") => max_positions as f64 / original_max_positions,
                None => rope.required_positive("factor")?,
            };
            let at_least_zero = |key| rope.number(key, |v| v >= 0.0, "a finite number, 0 or above");
            // In the reference 0 and absent are the same for these four.
            let nonzero = |key| at_least_zero(key).map(|v| v.filter(|v| *v != 0.0));
            let attention_factor =
                match (at_least_zero("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                    (Some(given), _, _) => given,
                    (None, Some(mscale), Some(all_dim)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
                    (None, _, _) => yarn_mscale(factor, 1.0),
                };
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                original_max_positions,
                truncate: rope.flag("truncate", true)?,
            }
        }
        "llama3" => {
            let low_freq_factor = rope.required_positive("low_freq_factor")?;
            let high_freq_factor = rope.required_positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(rope.invalid("high_freq_factor", "it must be above `low_freq_factor`"));
            }
            RopeScaling::Llama3 {
                factor: rope.required_positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: original()?,
            }
        }
        _ => return Err(rope.invalid(kind_key, "known kinds of rope are default, linear, dynamic, yarn and llama3")),
    };
    Ok(RopeSpec { dims, pairs, theta, scaling })
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
