//! All instantiations of the kernels give the same bits, and the right values.

use half::{bf16, f16};
use proptest::prelude::*;

use super::combine::{Combination, combine};
use super::inputs::Inputs;
use super::kernel::{Shape, multiply, silu_mul};
use crate::lanes::{Isa, Stored};

fn value() -> impl Strategy<Value = f32> {
    prop_oneof![8 => -4.0f32..4.0, 1 => Just(0.0), 1 => -1e4f32..1e4, 1 => -1e-6f32..1e-6]
}

fn product<W: Stored>(isa: Isa, x: &[f32], w: &[W], rows: usize, inputs: usize, columns: (usize, usize)) -> Vec<f32> {
    let outputs = w.len() / inputs;
    let mut y = vec![f32::NAN; rows * outputs];
    let shape = Shape { rows, inputs, outputs, columns };
    assert!(x.len() == rows * inputs && columns.1 <= outputs);
    let x = Inputs::new(isa, x.as_ptr(), rows, inputs);
    // SAFETY: lengths are asserted, and `isa` comes from `Isa::available`.
    unsafe { multiply(isa, &x, w.as_ptr(), y.as_mut_ptr(), shape) };
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn check<W: Stored>(
    x: &[f32],
    w: &[W],
    wide: impl Fn(W) -> f32,
    rows: usize,
    inputs: usize,
) -> Result<(), TestCaseError> {
    let outputs = w.len() / inputs;
    let all = product(Isa::Portable, x, w, rows, inputs, (0, outputs));
    for isa in Isa::available() {
        prop_assert_eq!(bits(&product(isa, x, w, rows, inputs, (0, outputs))), bits(&all), "{:?}", isa);
        for row in 0..rows {
            let alone = product(isa, &x[row * inputs..(row + 1) * inputs], w, 1, inputs, (0, outputs));
            prop_assert_eq!(bits(&alone), bits(&all[row * outputs..(row + 1) * outputs]), "{:?} row {}", isa, row);
        }
        for column in 0..outputs {
            let alone = product(isa, x, w, rows, inputs, (column, column + 1));
            for row in 0..rows {
                let at = row * outputs + column;
                prop_assert_eq!(alone[at].to_bits(), all[at].to_bits(), "{:?} column {}", isa, column);
            }
        }
    }
    for row in 0..rows {
        for column in 0..outputs {
            let terms = (0..inputs).map(|i| f64::from(x[row * inputs + i]) * f64::from(wide(w[column * inputs + i])));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let error = (f64::from(all[row * outputs + column]) - sum).abs();
            // A chain of n roundings, each of half a unit in the last place of at most `size`.
            prop_assert!(error <= size * (inputs / 16 + 6) as f64 * 6e-8 + 1e-30, "{error} of {size}");
        }
    }
    Ok(())
}

/// Rows of `x` and `y` lie further apart than they are long.
fn combined<W: Stored>(isa: Isa, x: &[f32], w: &[W], rows: usize, inputs: usize) -> Vec<f32> {
    let outputs = w.len() / inputs;
    let (x_stride, y_stride) = (inputs + 3, outputs + 5);
    let mut spread = vec![f32::NAN; rows * x_stride];
    for (to, from) in spread.chunks_mut(x_stride).zip(x.chunks(inputs)) {
        to[..inputs].copy_from_slice(from);
    }
    let mut y = vec![7.0; rows * y_stride];
    let shape = Combination { rows, inputs, outputs, x_stride, y_stride };
    // SAFETY: as long as the shape says, and `isa` comes from `Isa::available`.
    unsafe { combine(isa, spread.as_ptr(), w.as_ptr(), y.as_mut_ptr(), shape) };
    assert!(y.chunks(y_stride).all(|row| row[outputs..].iter().all(|untouched| *untouched == 7.0)));
    y.chunks(y_stride).flat_map(|row| row[..outputs].to_vec()).collect()
}

fn check_combined<W: Stored>(
    x: &[f32],
    w: &[W],
    wide: impl Fn(W) -> f32,
    rows: usize,
    inputs: usize,
) -> Result<(), TestCaseError> {
    let outputs = w.len() / inputs;
    let all = combined(Isa::Portable, x, w, rows, inputs);
    for isa in Isa::available() {
        prop_assert_eq!(bits(&combined(isa, x, w, rows, inputs)), bits(&all), "{:?}", isa);
        for row in 0..rows {
            let alone = combined(isa, &x[row * inputs..(row + 1) * inputs], w, 1, inputs);
            prop_assert_eq!(bits(&alone), bits(&all[row * outputs..(row + 1) * outputs]), "{:?} row {}", isa, row);
        }
    }
    for row in 0..rows {
        for column in 0..outputs {
            let terms = (0..inputs).map(|i| f64::from(x[row * inputs + i]) * f64::from(wide(w[i * outputs + column])));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let error = (f64::from(all[row * outputs + column]) - sum).abs();
            prop_assert!(error <= size * (inputs + 2) as f64 * 6e-8 + 1e-30, "{error} of {size}");
        }
    }
    Ok(())
}

#[test]
fn blocks_of_many_rows_inputs_and_columns_agree_with_a_row_alone() {
    // More of each than a block has, and an incomplete one at the end; then whole vectors, which some kernels read as they lie.
    for (rows, inputs, outputs) in [(150, 1100, 17), (258, 1136, 29)] {
        many_rows_inputs_and_columns(rows, inputs, outputs);
    }
}

fn many_rows_inputs_and_columns(rows: usize, inputs: usize, outputs: usize) {
    let x: Vec<f32> = (0..rows * inputs).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
    let w: Vec<f32> = (0..outputs * inputs).map(|i| ((i * 53 % 89) as f32 - 44.0) * 0.017).collect();
    check(&x, &w, |v| v, rows, inputs).unwrap();
    let brain: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
    check(&x, &brain, bf16::to_f32, rows, inputs).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn instantiations_rows_and_columns_agree_bit_for_bit_and_with_f64(
        (rows, inputs, outputs) in (0usize..20, 1usize..70, 1usize..12),
        seed in proptest::collection::vec(value(), 64),
    ) {
        let at = |i: usize| seed[(i * 31 + i / 64 * 17) % 64];
        let x: Vec<f32> = (0..rows * inputs).map(at).collect();
        let w: Vec<f32> = (0..outputs * inputs).map(|i| at(i * 7 + 3)).collect();
        check(&x, &w, |v| v, rows, inputs)?;
        let half: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
        check(&x, &half, f16::to_f32, rows, inputs)?;
        let brain: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        check(&x, &brain, bf16::to_f32, rows, inputs)?;
    }

    #[test]
    fn combinations_agree_bit_for_bit_alone_and_together_and_with_f64(
        (rows, inputs, outputs) in (0usize..11, 1usize..20, 1usize..150),
        seed in proptest::collection::vec(value(), 64),
    ) {
        let at = |i: usize| seed[(i * 31 + i / 64 * 17) % 64];
        let x: Vec<f32> = (0..rows * inputs).map(at).collect();
        let w: Vec<f32> = (0..outputs * inputs).map(|i| at(i * 7 + 3)).collect();
        check_combined(&x, &w, |v| v, rows, inputs)?;
        let half: Vec<f16> = w.iter().map(|v| f16::from_f32(*v)).collect();
        check_combined(&x, &half, f16::to_f32, rows, inputs)?;
        let brain: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        check_combined(&x, &brain, bf16::to_f32, rows, inputs)?;
    }

    #[test]
    fn silu_agrees_bit_for_bit_and_with_f64(gate in proptest::collection::vec(-120.0f32..120.0, 1..40)) {
        let up: Vec<f32> = gate.iter().map(|v| v * 0.5 + 1.0).collect();
        let run = |isa| {
            let mut out = gate.clone();
            // SAFETY: both are of the same length, and `isa` comes from `Isa::available`.
            unsafe { silu_mul(isa, out.as_mut_ptr(), up.as_ptr(), out.len()) };
            out
        };
        let expected = run(Isa::Portable);
        for isa in Isa::available() {
            prop_assert_eq!(bits(&run(isa)), bits(&expected), "{:?}", isa);
        }
        for ((gate, up), found) in gate.iter().zip(&up).zip(expected) {
            let (gate, up) = (f64::from(*gate), f64::from(*up));
            let exact = gate / (1.0 + (-gate).exp()) * up;
            prop_assert!((f64::from(found) - exact).abs() <= exact.abs() * 5e-7 + 1e-30, "{gate}: {found} {exact}");
        }
    }
}
