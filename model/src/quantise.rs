//! Writing weights in fewer bits, as GGML's reference does (`ggml-quants.c`).

mod folder;

use half::{bf16, f16};

pub use folder::{FolderError, Precision, Written, quantise_folder};

use crate::checkpoint::StoredDtype;
use crate::linear::{GROUP, Packed, Q4K, Q8_0};

/// Why values cannot be written in a dtype.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantiseError {
    /// Infinite or not a number.
    #[error("value {at} is {value}: weights must be finite numbers")]
    NotFinite {
        /// Which one.
        at: usize,
        /// The value.
        value: f32,
    },
    /// Values near it are too large.
    #[error("values near {at} are too large for {dtype:?}")]
    TooLarge {
        /// Which one.
        at: usize,
        /// The dtype.
        dtype: StoredDtype,
    },
    /// They are no whole number of blocks.
    #[error("{values} values are no whole number of blocks of {block}, which {dtype:?} takes")]
    Blocks {
        /// How many.
        values: usize,
        /// Values of a block.
        block: usize,
        /// The dtype.
        dtype: StoredDtype,
    },
    /// Nothing writes it.
    #[error("weights can be written as f32, f16, bf16, q8_0 and q4_k, not as {0:?}")]
    Unsupported(StoredDtype),
}

/// Appends a row of weights to `to`, stored as `dtype`: the nearest f16 or bf16; q8_0 by the largest value of each block; q4_k by a
/// search for the scales and minima with the least weighted error.
///
/// # Errors
/// [`QuantiseError`], as its variants say; `to` then ends anywhere.
pub fn quantise(row: &[f32], dtype: StoredDtype, to: &mut Vec<u8>) -> Result<(), QuantiseError> {
    if let Some(at) = row.iter().position(|value| !value.is_finite()) {
        return Err(QuantiseError::NotFinite { at, value: row[at] });
    }
    let block = dtype.block().0;
    if !row.len().is_multiple_of(block) {
        return Err(QuantiseError::Blocks { values: row.len(), block, dtype });
    }
    let start = to.len();
    match dtype {
        StoredDtype::F32 => to.extend(row.iter().flat_map(|value| value.to_le_bytes())),
        StoredDtype::F16 => to.extend(row.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        StoredDtype::Bf16 => to.extend(row.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
        StoredDtype::Q8_0 => row.as_chunks().0.iter().for_each(|block| q8_0(block, to)),
        StoredDtype::Q4K => row.as_chunks().0.iter().for_each(|block| q4_k(block, to)),
        StoredDtype::F8E4m3 | StoredDtype::F4E2m1 | StoredDtype::F8E8m0 => {
            return Err(QuantiseError::Unsupported(dtype));
        }
    }
    // What is too large has become infinite.
    match dtype.not_finite(&to[start..]) {
        Some((at, _)) => Err(QuantiseError::TooLarge { at, dtype }),
        None => Ok(()),
    }
}

fn q8_0(block: &[f32; Q8_0::BLOCK], to: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    to.extend(f16::from_f32(scale).to_le_bytes());
    to.extend(block.iter().map(|value| (value * inverse).round() as i8 as u8));
}

const GROUPS: usize = Q4K::BLOCK / GROUP;
/// The largest value of four bits, and of six.
const FOUR_BITS: f32 = 15.0;
const SIX_BITS: f32 = 63.0;

fn q4_k(block: &[f32; Q4K::BLOCK], to: &mut Vec<u8>) {
    let (groups, _) = block.as_chunks::<GROUP>();
    let (mut scales, mut minima) = ([0.0f32; GROUPS], [0.0f32; GROUPS]);
    for (number, group) in groups.iter().enumerate() {
        (scales[number], minima[number]) = scale_and_minimum(group);
    }
    let largest = |values: &[f32]| values.iter().fold(0.0f32, |a, b| a.max(*b));
    let six_bits = |values: &[f32; GROUPS]| {
        let largest = largest(values);
        let inverse = if largest > 0.0 { SIX_BITS / largest } else { 0.0 };
        let bits = values.map(|value| (value * inverse).round_ties_even().clamp(0.0, SIX_BITS) as u8);
        (f16::from_f32(largest / SIX_BITS), bits)
    };
    let ((scale, scales), (minimum, minima)) = (six_bits(&scales), six_bits(&minima));
    to.extend(scale.to_le_bytes());
    to.extend(minimum.to_le_bytes());
    to.extend(pack_six_bits(scales, minima));
    let mut codes = [0u8; Q4K::BLOCK];
    for (number, (group, codes)) in groups.iter().zip(codes.as_chunks_mut::<GROUP>().0).enumerate() {
        let step = scale.to_f32() * f32::from(scales[number]);
        let offset = minimum.to_f32() * f32::from(minima[number]);
        if step != 0.0 {
            for (code, value) in codes.iter_mut().zip(group) {
                *code = ((value + offset) / step).round_ties_even().clamp(0.0, FOUR_BITS) as u8;
            }
        }
    }
    for two_groups in codes.as_chunks::<{ 2 * GROUP }>().0 {
        let (low, high) = two_groups.split_at(GROUP);
        to.extend(low.iter().zip(high).map(|(low, high)| low | (high << 4)));
    }
}

/// The reverse of [`Q4K::six_bits`].
fn pack_six_bits(scales: [u8; GROUPS], minima: [u8; GROUPS]) -> [u8; Q4K::SCALES] {
    let half = GROUPS / 2;
    let mut packed = [0; Q4K::SCALES];
    for i in 0..half {
        packed[i] = scales[i] | (scales[i + half] >> 4 << 6);
        packed[i + half] = minima[i] | (minima[i + half] >> 4 << 6);
        packed[i + 2 * half] = (scales[i + half] & 15) | ((minima[i + half] & 15) << 4);
    }
    packed
}

/// The scale and the minimum, not negative, for which `scale * code - minimum` is nearest to the values of a group, larger ones
/// counting more. Tries some scales, and takes for each the best fit of a line through the codes that it gives (`make_qkx2_quants`).
fn scale_and_minimum(group: &[f32; GROUP]) -> (f32, f32) {
    let mean_square = group.iter().map(|value| value * value).sum::<f32>() / GROUP as f32;
    let weights = group.map(|value| mean_square.sqrt() + value.abs());
    let least = group.iter().fold(0.0f32, |a, b| a.min(*b));
    let most = group.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    if most <= least {
        return (0.0, -least);
    }
    let codes_of =
        |inverse: f32| group.map(|value| (inverse * (value - least)).round_ties_even().clamp(0.0, FOUR_BITS));
    let error_of = |codes: &[f32; GROUP], scale: f32, offset: f32| -> f32 {
        let error = |((code, value), weight): ((&f32, &f32), &f32)| weight * (scale * code + offset - value).powi(2);
        codes.iter().zip(group).zip(&weights).map(error).sum()
    };
    let sum_of = |term: &dyn Fn(usize) -> f32| (0..GROUP).map(|i| weights[i] * term(i)).sum::<f32>();
    let (sum_w, sum_x) = (sum_of(&|_| 1.0), sum_of(&|i| group[i]));
    let (mut scale, mut offset) = ((most - least) / FOUR_BITS, least);
    let mut least_error = error_of(&codes_of(FOUR_BITS / (most - least)), scale, offset);
    for step in 0..=20 {
        let codes = codes_of((0.1 * step as f32 - 1.0 + FOUR_BITS) / (most - least));
        let (sum_l, sum_l2) = (sum_of(&|i| codes[i]), sum_of(&|i| codes[i] * codes[i]));
        let sum_xl = sum_of(&|i| codes[i] * group[i]);
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut fitted = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut fitted_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if fitted_offset > 0.0 {
            (fitted, fitted_offset) = (sum_xl / sum_l2, 0.0);
        }
        let error = error_of(&codes, fitted, fitted_offset);
        if error < least_error {
            (scale, offset, least_error) = (fitted, fitted_offset, error);
        }
    }
    (scale, -offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(row: &[f32], dtype: StoredDtype) -> Vec<f32> {
        let mut bytes = Vec::new();
        quantise(row, dtype, &mut bytes).unwrap();
        assert_eq!(Some(bytes.len()), dtype.bytes(row.len()));
        crate::linear::reference::dequantised(dtype, &bytes)
    }

    fn normal(seed: u64, count: usize) -> Vec<f32> {
        // The sum of twelve numbers from 0 to 1 is nearly normal.
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect()
    }

    fn relative_error(row: &[f32], dtype: StoredDtype) -> f32 {
        let (mut error, mut size) = (0.0, 0.0);
        for (value, found) in row.iter().zip(written(row, dtype)) {
            error += (value - found).powi(2);
            size += value.powi(2);
        }
        (error / size).sqrt()
    }

    #[test]
    fn normal_weights_lose_as_much_as_the_bits_say() {
        let row = normal(1, 16 * 256);
        // Steps of a 127th of about 2.2 deviations, and of a 15th of about 4.2, uniformly off: a step by the root of 12.
        assert!(relative_error(&row, StoredDtype::Q8_0) < 0.006);
        let q4_k = relative_error(&row, StoredDtype::Q4K);
        assert!((0.05..0.085).contains(&q4_k), "{q4_k}");
        // Without the search: the whole range in fifteen steps.
        let plain = |group: &[f32]| {
            let (least, most) = group.iter().fold((0.0f32, 0.0f32), |(a, b), v| (a.min(*v), b.max(*v)));
            let step = (most - least) / FOUR_BITS;
            group.iter().map(|v| (((v - least) / step).round() * step + least - v).powi(2)).sum::<f32>()
        };
        let plain = row.chunks(GROUP).map(plain).sum::<f32>() / row.iter().map(|v| v * v).sum::<f32>();
        assert!(q4_k < plain.sqrt() * 1.01, "{q4_k} {}", plain.sqrt());
    }

    #[test]
    fn zeros_and_equal_values_stay_what_they_are() {
        for dtype in [StoredDtype::Q8_0, StoredDtype::Q4K] {
            assert_eq!(written(&[0.0; 256], dtype), [0.0; 256]);
            assert!(written(&[-0.5; 256], dtype).iter().all(|value| (value + 0.5).abs() < 2e-3), "{dtype:?}");
            assert!(written(&[0.5; 256], dtype).iter().all(|value| (value - 0.5).abs() < 2e-3), "{dtype:?}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let refused = |row: &[f32], dtype| quantise(row, dtype, &mut Vec::new()).unwrap_err();
        let mut row = vec![1.0; 256];
        assert!(matches!(
            refused(&row[..250], StoredDtype::Q4K),
            QuantiseError::Blocks { values: 250, block: 256, .. }
        ));
        row[7] = f32::NAN;
        assert!(matches!(refused(&row, StoredDtype::Q8_0), QuantiseError::NotFinite { at: 7, .. }));
        row[7] = 1e10;
        for dtype in [StoredDtype::F16, StoredDtype::Q8_0, StoredDtype::Q4K] {
            assert!(matches!(refused(&row, dtype), QuantiseError::TooLarge { .. }), "{dtype:?}");
        }
        assert_eq!(refused(&[1.0], StoredDtype::F8E4m3), QuantiseError::Unsupported(StoredDtype::F8E4m3));
    }

    proptest! {
        #[test]
        fn six_bits_survive_packing(values in proptest::collection::vec(0u8..64, 2 * GROUPS)) {
            let (scales, minima) = values.split_at(GROUPS);
            let packed = pack_six_bits(scales.try_into().unwrap(), minima.try_into().unwrap());
            prop_assert_eq!(&Q4K::six_bits(packed)[..], &values[..]);
        }

        #[test]
        fn values_stay_within_a_step(row in proptest::collection::vec(-4.0f32..4.0, 256)) {
            for (group, found) in row.chunks(GROUP).zip(written(&row, StoredDtype::Q8_0).chunks(GROUP)) {
                let largest = group.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (value, found) in group.iter().zip(found) {
                    prop_assert!((value - found).abs() <= largest / 127.0 * 0.57, "{value} {found} of {largest}");
                }
            }
            for (group, found) in row.chunks(GROUP).zip(written(&row, StoredDtype::Q4K).chunks(GROUP)) {
                for (value, found) in group.iter().zip(found) {
                    // The range is at most 8, in fifteen steps; the scale of six bits may be off by a 126th of the largest.
                    prop_assert!((value - found).abs() <= 8.0 / 15.0 * 1.5, "{value} {found}");
                }
            }
        }
    }
}
