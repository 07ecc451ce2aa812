//! Drawing tokens, and stopping at strings.

use hanse_model::{Sampler, SamplingError, SamplingParams, StopStrings, log_softmax_at, top_log_softmax};

fn params(temperature: f32, top_k: Option<usize>, top_p: Option<f32>, seed: u64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, seed, ..SamplingParams::default() }
}

fn shares(params: SamplingParams, logits: &[f32]) -> Vec<f64> {
    let mut sampler = Sampler::new(params).unwrap();
    let mut counts = vec![0; logits.len()];
    let draws = 20_000;
    for _ in 0..draws {
        counts[sampler.sample(logits) as usize] += 1;
    }
    counts.iter().map(|count| f64::from(*count) / f64::from(draws)).collect()
}

#[test]
fn greedy_takes_the_best_and_of_equals_the_lowest() {
    let mut sampler = Sampler::new(SamplingParams::greedy()).unwrap();
    assert_eq!(sampler.sample(&[0.0, 3.0, 3.0, -1.0]), 1);
    assert_eq!(sampler.sample(&[f32::NAN, -5.0, f32::NAN, -4.0]), 3);
}

#[test]
fn shares_are_those_of_softmax_at_the_temperature() {
    let logits = [1.0, 0.0, -1.0, 2.0];
    let found = shares(params(0.7, None, None, 5), &logits);
    let weights: Vec<f64> = logits.iter().map(|v| (f64::from(*v) / 0.7).exp()).collect();
    let sum: f64 = weights.iter().sum();
    for (found, weight) in found.iter().zip(weights) {
        // Four standard deviations of 20,000 draws are below 0.015.
        assert!((found - weight / sum).abs() < 0.015, "{found} {}", weight / sum);
    }
}

#[test]
fn top_k_keeps_the_best_and_those_equal_to_the_last_of_them() {
    assert_eq!(shares(params(1.0, Some(1), None, 1), &[0.0, 1.0, 0.5])[1], 1.0);
    let found = shares(params(1.0, Some(2), None, 1), &[0.0, 1.0, 0.5, 0.5]);
    assert!(found[0] == 0.0 && found[1..].iter().all(|share| *share > 0.2));
    assert!(shares(params(1.0, Some(0), None, 1), &[0.0, 0.0]).iter().all(|share| *share > 0.4));
    assert!(shares(params(1.0, Some(9), None, 1), &[0.0, 0.0]).iter().all(|share| *share > 0.4));
}

#[test]
fn top_p_keeps_the_least_tokens_that_reach_it_after_top_k() {
    // Probabilities 0.5, 0.3, 0.2.
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    assert_eq!(shares(params(1.0, None, Some(0.45), 2), &logits), [1.0, 0.0, 0.0]);
    assert_eq!(shares(params(1.0, None, Some(0.7), 2), &logits)[2], 0.0);
    assert!(shares(params(1.0, None, Some(0.9), 2), &logits)[2] > 0.15);
    assert_eq!(shares(params(1.0, None, Some(0.0), 2), &logits)[0], 1.0);
    // Of the two that top-k leaves, the first has 0.625.
    assert_eq!(shares(params(1.0, Some(2), Some(0.6), 2), &logits), [1.0, 0.0, 0.0]);
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
    let draw = |seed| {
        let mut sampler = Sampler::new(params(1.0, Some(40), Some(0.95), seed)).unwrap();
        (0..30).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
    };
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
}

#[test]
fn logits_that_are_no_numbers_do_not_panic_and_are_never_drawn() {
    for p in [params(0.0, None, None, 0), params(1.0, Some(2), Some(0.9), 0), params(1e-30, None, Some(0.5), 0)] {
        let mut sampler = Sampler::new(p).unwrap();
        assert_eq!(sampler.sample(&[]), 0);
        assert_eq!(sampler.sample(&[f32::NAN; 4]), 0);
        assert_eq!(sampler.sample(&[f32::NAN, 1.0, f32::NEG_INFINITY]), 1);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3]), 0);
        assert_eq!(sampler.sample(&[0.0, f32::INFINITY, f32::NAN]), 1);
    }
}

#[test]
fn parameters_that_make_no_sense_are_refused() {
    assert!(matches!(Sampler::new(params(f32::NAN, None, None, 0)), Err(SamplingError::Temperature(_))));
    assert!(matches!(Sampler::new(params(-1.0, None, None, 0)), Err(SamplingError::Temperature(_))));
    assert!(matches!(Sampler::new(params(1.0, None, Some(1.5), 0)), Err(SamplingError::TopP(_))));
    assert!(matches!(Sampler::new(params(1.0, None, Some(f32::NAN), 0)), Err(SamplingError::TopP(_))));
}

#[test]
fn log_softmax_is_the_logarithm_of_the_share() {
    let logits = [1000.0, 1001.0, 999.0];
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - 1001.0).exp()).sum();
    assert!((f64::from(log_softmax_at(&logits, 0)) - (-1.0 - sum.ln())).abs() < 1e-6);
    assert_eq!(log_softmax_at(&logits, 3), f32::NEG_INFINITY);
    assert_eq!(log_softmax_at(&[], 0), f32::NEG_INFINITY);
}

fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
    let mut stop = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()));
    let mut shown = Vec::new();
    for piece in pieces {
        let output = stop.push(piece);
        shown.push(output.text);
        if output.stopped {
            return (shown, true);
        }
    }
    shown.push(stop.finish());
    (shown, false)
}

#[test]
fn a_stop_string_in_pieces_is_found_and_never_shown() {
    assert_eq!(run(&["END"], &["a E", "N", "D b"]), (vec!["a ".into(), String::new(), String::new()], true));
    assert_eq!(run(&["\n\n", "wo"], &["hello\nwo"]), (vec!["hello\n".into()], true));
    assert_eq!(run(&["abab"], &["ab", "aab", "ab"]), (vec![String::new(), "aba".into(), String::new()], true));
}

#[test]
fn what_only_looked_like_a_stop_string_is_shown() {
    assert_eq!(run(&["END"], &["EN", "x", "E"]), (vec![String::new(), "ENx".into(), String::new(), "E".into()], false));
    assert_eq!(run(&["é!"], &["aé", "?"]), (vec!["a".into(), "é?".into(), String::new()], false));
    assert_eq!(run(&["", ""], &["ab"]), (vec!["ab".into(), String::new()], false));
}

#[test]
fn penalties_and_biases_change_what_is_best() {
    let logits = [1.0, 3.0, 2.5, 0.0];
    let drawn = |params: SamplingParams| {
        let mut sampler = Sampler::new(params).unwrap();
        (0..6).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
    };
    let greedy = SamplingParams::greedy();
    assert_eq!(drawn(greedy.clone()), [1; 6]);
    assert_eq!(drawn(SamplingParams { presence_penalty: 1.0, ..greedy.clone() }), [1, 2, 1, 1, 1, 1]);
    assert_eq!(drawn(SamplingParams { frequency_penalty: 1.0, ..greedy.clone() }), [1, 2, 1, 2, 0, 1]);
    assert_eq!(drawn(SamplingParams { logit_bias: vec![(3, 10.0), (99, 5.0)], ..greedy.clone() }), [3; 6]);
    for (name, params) in [
        ("presence_penalty", SamplingParams { presence_penalty: f32::NAN, ..greedy.clone() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(0, 101.0)], ..greedy }),
    ] {
        assert!(Sampler::new(params).unwrap_err().to_string().starts_with(name));
    }
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let logits: Vec<f32> = (0..70).map(|token| token as f32).collect();
    let mut greedy = Sampler::new(SamplingParams::greedy()).unwrap();
    assert_eq!(greedy.sample_allowed(&logits, &[u32::MAX; 3]), 69);
    assert_eq!(greedy.sample_allowed(&logits, &[1 << 31, 1 << 4]), 36, "tokens beyond the words are not allowed");
    assert_eq!(greedy.sample_allowed(&[f32::NEG_INFINITY, 1.0], &[1]), 1, "what is allowed is impossible");
    let mut drawing = Sampler::new(params(50.0, None, None, 3)).unwrap();
    assert!((0..50).map(|_| drawing.sample_allowed(&logits, &[0b1010])).all(|token| token == 1 || token == 3));
}

#[test]
fn the_most_probable_tokens_come_best_first() {
    let top = top_log_softmax(&[0.0, 2.0, f32::NAN, 2.0, 1.0], 3);
    assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 4]);
    assert!(top_log_softmax(&[], 3).is_empty() && top_log_softmax(&[1.0], 0).is_empty());
    let top = top_log_softmax(&[0.0, 1.0], 9);
    assert_eq!(top[0].1, log_softmax_at(&[0.0, 1.0], 1));
}
