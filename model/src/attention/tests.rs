//! Attention gives the same bits whatever is computed beside a query, and the right values.

use proptest::prelude::*;

use super::{BLOCK, Group, Query, attend};
use crate::lanes::Isa;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Many queries at once, on every instruction set, against each of them alone in portable code, and against f64.
    #[test]
    fn a_query_has_the_same_bits_alone_and_in_any_group_and_agrees_with_f64(
        key_dim in 1usize..100,
        value_dim in 1usize..100,
        latent in any::<bool>(),
        sinks in any::<bool>(),
        positions in 1usize..3 * BLOCK,
        windows in proptest::collection::vec((0usize..3 * BLOCK, 1usize..3 * BLOCK), 1..14),
        seed in proptest::collection::vec(-3.0f32..3.0, 64),
    ) {
        let at = |i: usize| seed[(i * 29 + i / 64 * 13) % 64];
        let count = windows.len();
        let inputs: Vec<f32> = (0..count * key_dim).map(at).collect();
        let keys: Vec<f32> = (0..positions * key_dim).map(|i| at(i + 5)).collect();
        // Values by themselves, or the first values of each key.
        let (value_dim, value_stride) = if latent { (value_dim.min(key_dim), key_dim) } else { (value_dim, value_dim) };
        let own: Vec<f32> = (0..positions * value_dim).map(|i| at(i + 11)).collect();
        let values = if latent { &keys } else { &own };
        let sink = |n: usize| sinks.then(|| at(n + 3));
        let scale = (key_dim as f32).powf(-0.5);
        let seen = |n: usize| {
            let start = windows[n].0.min(positions - 1);
            start..positions.min(start + windows[n].1)
        };
        let run = |isa, chosen: std::ops::Range<usize>, out: &mut [f32]| {
            let queries: Vec<Query> = chosen
                .map(|n| Query {
                    query: inputs[n * key_dim..].as_ptr(),
                    out: out[n * value_dim..].as_mut_ptr(),
                    sink: sink(n),
                    start: seen(n).start,
                    end: seen(n).end,
                })
                .collect();
            let group = Group { keys: &keys, values, key_dim, value_dim, value_stride, scale, queries: &queries };
            // SAFETY: lengths agree by construction, and `isa` comes from `Isa::available`.
            unsafe { attend(isa, group) };
        };
        let mut alone = vec![f32::NAN; count * value_dim];
        (0..count).for_each(|n| run(Isa::Portable, n..n + 1, &mut alone));
        for isa in Isa::available() {
            let mut together = vec![f32::NAN; count * value_dim];
            run(isa, 0..count, &mut together);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&together), bits(&alone), "{:?}", isa);
        }
        for n in 0..count {
            let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let query = wide(&inputs[n * key_dim..(n + 1) * key_dim]);
            let weights: Vec<f64> = seen(n)
                .map(|p| wide(&keys[p * key_dim..(p + 1) * key_dim]).iter().zip(&query).map(|(a, b)| a * b).sum::<f64>())
                .map(|score| (score * f64::from(scale)).exp())
                .collect();
            let sum: f64 = weights.iter().sum::<f64>() + sink(n).map_or(0.0, |sink| f64::from(sink).exp());
            for dim in 0..value_dim {
                let value = |p: usize| f64::from(values[p * value_stride + dim]);
                let exact: f64 = seen(n).zip(&weights).map(|(p, w)| w / sum * value(p)).sum();
                let found = alone[n * value_dim + dim];
                prop_assert!((f64::from(found) - exact).abs() <= 3e-5, "{found} {exact}");
            }
        }
    }
}
