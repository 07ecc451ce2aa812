//! Attention gives the same bits whatever is computed beside a query, and the right values.

use proptest::prelude::*;

use super::{BLOCK, Group, Query, attend};
use crate::lanes::Isa;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Many queries at once, on every instruction set, against each of them alone in portable code, and against f64.
    #[test]
    fn a_query_has_the_same_bits_alone_and_in_any_group_and_agrees_with_f64(
        head_dim in (1usize..50).prop_map(|half| 2 * half),
        positions in 1usize..3 * BLOCK,
        windows in proptest::collection::vec((0usize..3 * BLOCK, 1usize..3 * BLOCK), 1..14),
        seed in proptest::collection::vec(-3.0f32..3.0, 64),
    ) {
        let at = |i: usize| seed[(i * 29 + i / 64 * 13) % 64];
        let count = windows.len();
        let inputs: Vec<f32> = (0..count * head_dim).map(at).collect();
        let keys: Vec<f32> = (0..positions * head_dim).map(|i| at(i + 5)).collect();
        let values: Vec<f32> = (0..positions * head_dim).map(|i| at(i + 11)).collect();
        let scale = (head_dim as f32).powf(-0.5);
        let seen = |n: usize| {
            let start = windows[n].0.min(positions - 1);
            start..positions.min(start + windows[n].1)
        };
        let run = |isa, chosen: std::ops::Range<usize>, out: &mut [f32]| {
            let queries: Vec<Query> = chosen
                .map(|n| Query {
                    query: inputs[n * head_dim..].as_ptr(),
                    out: out[n * head_dim..].as_mut_ptr(),
                    start: seen(n).start,
                    end: seen(n).end,
                })
                .collect();
            let group = Group { keys: &keys, values: &values, head_dim, scale, queries: &queries };
            // SAFETY: lengths agree by construction, and `isa` comes from `Isa::available`.
            unsafe { attend(isa, group) };
        };
        let mut alone = vec![f32::NAN; count * head_dim];
        (0..count).for_each(|n| run(Isa::Portable, n..n + 1, &mut alone));
        for isa in Isa::available() {
            let mut together = vec![f32::NAN; count * head_dim];
            run(isa, 0..count, &mut together);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&together), bits(&alone), "{:?}", isa);
        }
        for n in 0..count {
            let row = |all: &'_ [f32], position: usize| -> Vec<f64> {
                all[position * head_dim..(position + 1) * head_dim].iter().map(|v| f64::from(*v)).collect()
            };
            let weights: Vec<f64> = seen(n)
                .map(|p| row(&keys, p).iter().zip(row(&inputs, n)).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale))
                .map(f64::exp)
                .collect();
            let sum: f64 = weights.iter().sum();
            for dim in 0..head_dim {
                let exact: f64 = seen(n).zip(&weights).map(|(p, w)| w / sum * row(&values, p)[dim]).sum();
                let found = alone[n * head_dim + dim];
                prop_assert!((f64::from(found) - exact).abs() <= 3e-5, "{found} {exact}");
            }
        }
    }
}
