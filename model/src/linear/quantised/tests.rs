//! Weights in few bits give the bits of the same weights as f32, on every instruction set, for any number of rows and columns.

use proptest::prelude::*;

use super::*;
use crate::linear::reference::{dequantised, e2m1, e4m3};
use crate::linear::{Inputs, kernel};

/// A matrix, and its values as f32 `[outputs, inputs]`.
struct Case {
    matrix: Quantised,
    wide: Vec<f32>,
}

fn mapping(bytes: &[u8]) -> Arc<Mapping> {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(Mapping::of(&file).unwrap())
}

/// Bytes of which none is preferred.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// A scale of either sign, about a thousandth, sometimes subnormal.
fn scale(byte: u8) -> [u8; 2] {
    half::f16::from_bits(u16::from(byte) << 8 & 0x9fff | 0x0155).to_le_bytes()
}

/// Starts at an odd byte: blocks need no alignment.
const START: usize = 3;

fn blocks(dtype: StoredDtype, seed: u64, outputs: usize, inputs: usize) -> Case {
    let mut bytes = noise(seed, START + dtype.bytes(outputs * inputs).unwrap());
    for block in bytes[START..].chunks_exact_mut(dtype.block().1) {
        let scales = [scale(block[0]), scale(block[2])];
        block[..2].copy_from_slice(&scales[0]);
        if dtype == StoredDtype::Q4K {
            block[2..4].copy_from_slice(&scales[1]);
        }
    }
    let wide = dequantised(dtype, &bytes[START..]);
    let matrix = Quantised::blocks((&mapping(&bytes), START), dtype, outputs, inputs).unwrap();
    Case { matrix, wide }
}

fn fp8(seed: u64, outputs: usize, inputs: usize) -> Case {
    let mut bytes = noise(seed, START + outputs * inputs);
    // Two codes are no numbers.
    bytes.iter_mut().filter(|byte| **byte & 0x7f == 0x7f).for_each(|byte| *byte ^= 1);
    let (tall, broad) = (outputs.div_ceil(128), inputs.div_ceil(128));
    let scales: Vec<f32> = noise(seed + 1, tall * broad).iter().map(|byte| f32::from(*byte) * 0.00123).collect();
    let scale_bytes: Vec<u8> = std::iter::once(0).chain(scales.iter().flat_map(|scale| scale.to_le_bytes())).collect();
    let value = |at: usize| e4m3(bytes[START + at]) * scales[at / inputs / 128 * broad + at % inputs / 128];
    let wide = (0..outputs * inputs).map(value).collect();
    let matrix = Quantised::fp8((&mapping(&bytes), START), (&mapping(&scale_bytes), 1), outputs, inputs);
    Case { matrix, wide }
}

/// Row `first`, and every second from there on.
fn mxfp4(seed: u64, first: usize, outputs: usize, inputs: usize) -> Case {
    let all = 2 * outputs;
    let bytes = noise(seed, START + all * inputs / 2);
    let scales: Vec<u8> = noise(seed + 1, all * inputs / 32).iter().map(|byte| 110 + byte % 30).collect();
    let value = |output: usize, input: usize| {
        let at = (first + 2 * output) * inputs + input;
        let byte = bytes[START + at / 2];
        e2m1(if at.is_multiple_of(2) { byte & 15 } else { byte >> 4 }) * 2f32.powi(i32::from(scales[at / 32]) - 127)
    };
    let wide = (0..outputs).flat_map(|output| (0..inputs).map(move |input| (output, input)));
    let wide = wide.map(|(output, input)| value(output, input)).collect();
    let (values, first_scale) = ((&mapping(&bytes), START + first * inputs / 2), first * inputs / 32);
    let matrix = Quantised::mxfp4(values, (&mapping(&scales), first_scale), 2, outputs, inputs).unwrap();
    Case { matrix, wide }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Compares a case with its values as f32, for these numbers of rows.
fn check(case: &Case, rows: &[usize]) {
    let Quantised { outputs, inputs, dtype, .. } = case.matrix;
    let most = rows.iter().copied().max().unwrap_or(0);
    let x: Vec<f32> = (0..most * inputs).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
    let mut row = vec![0.0; inputs];
    for number in 0..outputs {
        case.matrix.widen_row(number, &mut row);
        assert_eq!(bits(&row), bits(&case.wide[number * inputs..(number + 1) * inputs]), "{dtype:?} row {number}");
    }
    for &rows in rows {
        let all = Shape { rows, inputs, outputs, columns: (0, outputs) };
        let mut expected = vec![f32::NAN; rows * outputs];
        let (from, wide) = (x.as_ptr(), case.wide.as_ptr());
        let portable = Inputs::new(Isa::Portable, from, rows, inputs);
        // SAFETY: the lengths follow from the shape.
        unsafe { kernel::multiply(Isa::Portable, &portable, wide, expected.as_mut_ptr(), all) };
        for isa in Isa::available() {
            let mut found = vec![f32::NAN; rows * outputs];
            let from = Inputs::new(isa, from, rows, inputs);
            // SAFETY: as above, and `isa` is available.
            unsafe { case.matrix.multiply(&from, found.as_mut_ptr(), all) };
            assert_eq!(bits(&found), bits(&expected), "{dtype:?} {isa:?} {rows} rows [{outputs}, {inputs}]");
            // In two parts.
            let mut found = vec![f32::NAN; rows * outputs];
            for columns in [(0, outputs / 3), (outputs / 3, outputs)] {
                // SAFETY: as above.
                unsafe { case.matrix.multiply(&from, found.as_mut_ptr(), Shape { columns, ..all }) };
            }
            assert_eq!(bits(&found), bits(&expected), "{dtype:?} {isa:?} in parts");
        }
        for (at, found) in expected.iter().enumerate() {
            let (row, column) = (at / outputs, at % outputs);
            let term = |i| f64::from(x[row * inputs + i]) * f64::from(case.wide[column * inputs + i]);
            let (sum, size) = (0..inputs).map(term).fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            let error = (f64::from(*found) - sum).abs();
            assert!(error <= size * (inputs / 16 + 6) as f64 * 6e-8 + 1e-30, "{error} of {size}");
        }
    }
}

#[test]
fn products_have_the_bits_of_the_widened_matrix() {
    const ROWS: [usize; 8] = [0, 1, 2, 3, 4, 7, 9, 70];
    check(&blocks(StoredDtype::Q8_0, 1, 17, 1120), &ROWS);
    check(&blocks(StoredDtype::Q4K, 2, 17, 1280), &ROWS);
    check(&fp8(3, 300, 520), &ROWS);
    check(&mxfp4(4, 0, 17, 1120), &ROWS);
    check(&mxfp4(5, 1, 17, 1120), &ROWS);
}

#[test]
fn every_code_of_the_small_floats_is_what_its_specification_says() {
    // Rows that have all codes, and scales from the smallest to the largest that are allowed.
    let codes: Vec<u8> = (0..=255u8).map(|byte| if byte & 0x7f == 0x7f { 0 } else { byte }).collect();
    for scale in [f32::from_bits(1), 1e-30, 1.0, f32::MAX / 449.0] {
        let scales = [scale; 2].map(f32::to_le_bytes).concat();
        let matrix = Quantised::fp8((&mapping(&codes), 0), (&mapping(&scales), 0), 1, 256);
        check(&Case { matrix, wide: codes.iter().map(|code| e4m3(*code) * scale).collect() }, &[1, 5]);
    }
    let codes: Vec<u8> = (0..16u8).map(|code| code | (15 - code) << 4).collect();
    for exponent in [0, 1, 2, 127, 252] {
        let scale = 2f64.powi(i32::from(exponent) - 127) as f32;
        let matrix = Quantised::mxfp4((&mapping(&codes), 0), (&mapping(&[exponent]), 0), 1, 1, 32).unwrap();
        let wide = codes.iter().flat_map(|byte| [e2m1(byte & 15) * scale, e2m1(byte >> 4) * scale]).collect();
        let case = Case { matrix, wide };
        let mut row = vec![0.0; 32];
        case.matrix.widen_row(0, &mut row);
        assert_eq!(bits(&row), bits(&case.wide), "{exponent}");
    }
}

#[test]
fn rows_that_are_no_whole_blocks_make_no_matrix() {
    let map = mapping(&[0; 4096]);
    assert!(Quantised::blocks((&map, 0), StoredDtype::Q8_0, 2, 48).is_none());
    assert!(Quantised::blocks((&map, 0), StoredDtype::Q4K, 2, 128).is_none());
    assert!(Quantised::blocks((&map, 0), StoredDtype::F32, 2, 128).is_none());
    assert!(Quantised::mxfp4((&map, 0), (&map, 0), 1, 2, 48).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_agrees(seed in any::<u64>(), rows in 0usize..12, outputs in 1usize..14, wide in 1usize..5, odd in 1usize..300) {
        check(&blocks(StoredDtype::Q8_0, seed, outputs, 32 * wide), &[rows]);
        check(&blocks(StoredDtype::Q4K, seed, outputs, 256 * wide), &[rows]);
        check(&fp8(seed, outputs, odd), &[rows]);
        check(&mxfp4(seed, (seed % 2) as usize, outputs, 32 * wide), &[rows]);
    }
}
