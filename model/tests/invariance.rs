//! A row's bits do not depend on what else is computed, nor on how many threads compute it.

mod common;

use std::sync::Arc;

use common::{Golden, Local, WITH_EXPERTS, bits, fixture, fixtures, largest_difference, tiny_moe};
use hanse_model::{
    AttentionSpec, Checkpoint, Expert, ExpertJob, Experts, ExpertsError, ForwardError, KvCache, LocalExperts,
    LogitsWanted, Routing, Segment, Trunk, add_weighted, compute_pool, run_experts,
};

fn noise(len: usize, mut state: u32) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch_order_and_thread_count() {
    let names = ["qwen2_moe", "granitemoe", "glm4_moe", "gpt_oss", "extra/gpt_oss_newer"];
    for dir in names.map(fixture).into_iter().chain([tiny_moe()]) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let hidden = checkpoint.spec().hidden_size;
        let (layer, _) = checkpoint.spec().moe_layers().next().unwrap();
        let experts: Vec<Expert> = (0..4).map(|e| Expert::load(&checkpoint, layer, e).unwrap()).collect();
        let rows = 67;
        let input = noise(rows * hidden, 7);
        let one = compute_pool(1).unwrap();
        let alone: Vec<Vec<f32>> = experts
            .iter()
            .map(|expert| {
                let mut all = vec![0.0; input.len()];
                for (hidden, output) in input.chunks(hidden).zip(all.chunks_mut(hidden)) {
                    run_experts(&mut [ExpertJob { expert, hidden, output }], &one);
                }
                all
            })
            .collect();
        for threads in [1, 2, 3] {
            let pool = compute_pool(threads).unwrap();
            let mut outputs = vec![vec![f32::NAN; input.len()]; experts.len()];
            let mut jobs: Vec<_> = experts
                .iter()
                .zip(&mut outputs)
                .map(|(expert, output)| ExpertJob { expert, hidden: &input, output })
                .rev()
                .collect();
            run_experts(&mut jobs, &pool);
            for (found, expected) in outputs.iter().zip(&alone) {
                assert!(bits(found) == bits(expected), "{}: {threads} threads", dir.display());
            }
        }
    }
}

#[test]
fn experts_give_the_reference_rows() {
    for name in WITH_EXPERTS {
        let golden = Golden::open(&fixture(name));
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let pool = compute_pool(2).unwrap();
        let (layer, moe) = checkpoint.spec().moe_layers().next().unwrap();
        let hidden = golden.f32(&format!("p1.layer{layer}.mlp_in")).unwrap();
        let expected = golden.f32(&format!("p1.layer{layer}.expert_out")).unwrap();
        let std = (expected.iter().map(|v| v * v).sum::<f32>() / expected.len() as f32).sqrt();
        for (expert, expected) in (0..moe.experts).zip(expected.chunks(hidden.len())) {
            let expert = Expert::load(&checkpoint, layer, expert).unwrap();
            let mut output = vec![0.0; hidden.len()];
            run_experts(&mut [ExpertJob { expert: &expert, hidden: &hidden, output: &mut output }], &pool);
            assert!(largest_difference(&output, expected) <= 1e-4 * std, "{name}");
        }
    }
}

#[test]
fn sequences_together_have_the_bits_of_each_alone_whatever_the_thread_count() {
    for dir in fixtures() {
        let golden = Golden::open(&dir);
        let prompts: Vec<Vec<u32>> = (0..2).map(|n| golden.ids(&format!("p{n}.input_ids")).unwrap()).collect();
        let mut model = Local::with_threads(&dir, 1);
        let alone: Vec<_> = prompts.iter().map(|prompt| bits(&model.prefill(prompt))).collect();
        for threads in [1, 3] {
            let mut model = Local::with_threads(&dir, threads);
            let (mut a, mut b) = (model.trunk.new_cache(), model.trunk.new_cache());
            let mut segments = [
                Segment { tokens: &prompts[0], cache: &mut a, logits: LogitsWanted::All },
                Segment { tokens: &prompts[1], cache: &mut b, logits: LogitsWanted::All },
            ];
            let together = model.trunk.forward(&mut segments, &mut model.experts).unwrap();
            assert_eq!(together.iter().map(|logits| bits(logits)).collect::<Vec<_>>(), alone, "{}", dir.display());
        }
    }
}

#[test]
fn logits_come_for_the_positions_asked_for() {
    let mut model = Local::open(&fixture("mixtral"));
    let vocab = model.trunk.spec().vocab_size;
    let all = model.prefill(&[3, 5, 7]);
    let (mut a, mut b, mut c) = (model.trunk.new_cache(), model.trunk.new_cache(), model.trunk.new_cache());
    let mut segments = [
        Segment { tokens: &[3, 5, 7], cache: &mut a, logits: LogitsWanted::Last },
        Segment { tokens: &[3, 5], cache: &mut b, logits: LogitsWanted::None },
        Segment { tokens: &[3, 5], cache: &mut c, logits: LogitsWanted::All },
    ];
    let logits = model.trunk.forward(&mut segments, &mut model.experts).unwrap();
    assert_eq!(bits(&logits[0]), bits(&all[2 * vocab..]));
    assert!(logits[1].is_empty());
    assert_eq!(bits(&logits[2]), bits(&all[..2 * vocab]));
    assert!(model.trunk.forward(&mut [], &mut model.experts).unwrap().is_empty());
    assert_eq!((a.len(), b.len(), c.len()), (3, 2, 2));
}

#[test]
fn a_truncated_cache_goes_on_as_if_the_rest_had_never_been() {
    for name in ["qwen3_moe", "deepseek_v3", "extra/deepseek_v32", "gpt_oss"] {
        let mut model = Local::open(&fixture(name));
        let mut cache = model.trunk.new_cache();
        let tokens: Vec<u32> = (1..=12).collect();
        model.forward(&tokens, &mut cache, LogitsWanted::None);
        cache.truncate(20);
        assert_eq!(cache.len(), 12);
        let beginning = cache.prefix(10);
        cache.truncate(9);
        let vocab = model.trunk.spec().vocab_size;
        let mut after = |kept: usize, new: &[u32], cache: &mut KvCache| {
            let logits = model.forward(new, cache, LogitsWanted::All);
            let all = model.prefill(&[&tokens[..kept], new].concat());
            assert_eq!(bits(&logits), bits(&all[kept * vocab..]), "{name}");
        };
        after(9, &[99, 98], &mut cache);
        after(10, &[77], &mut { beginning });
    }
}

#[test]
fn latent_attention_keeps_the_latents_and_nothing_else() {
    let model = Local::open(&fixture("deepseek_v3"));
    let spec = model.trunk.spec();
    let AttentionSpec::Latent(attention) = &spec.layers[0].attention else { panic!("{spec:?}") };
    let cache = model.trunk.new_cache();
    assert_eq!(cache.bytes_per_position(), spec.layers.len() * (16 + 8) * 4);
    assert_eq!((attention.cached_values(), attention.expanded_values()), (24, 4 * (12 + 8 + 10)));
}

/// Fails or answers nonsense at one layer.
struct Failing {
    inner: LocalExperts,
    at: usize,
    short: bool,
}

impl Experts for Failing {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        match (layer == self.at, self.short) {
            (true, true) => Ok(vec![0.0; 3]),
            (true, false) => Err("nobody hosts it".into()),
            (false, _) => self.inner.forward(layer, hidden, routing),
        }
    }
}

#[test]
fn a_failed_pass_leaves_the_caches_as_they_were() {
    let checkpoint = Checkpoint::open(&fixture("mixtral")).unwrap();
    let pool = Arc::new(compute_pool(1).unwrap());
    let trunk = Trunk::load(&checkpoint, pool.clone()).unwrap();
    let mut local = LocalExperts::load(&checkpoint, pool.clone()).unwrap();
    let mut cache = trunk.new_cache();
    let run = |tokens: &[u32], cache: &mut _, experts: &mut dyn Experts| {
        trunk.forward(&mut [Segment { tokens, cache, logits: LogitsWanted::Last }], experts)
    };
    run(&[1, 2, 3], &mut cache, &mut local).unwrap();
    for short in [true, false] {
        let mut failing = Failing { inner: LocalExperts::load(&checkpoint, pool.clone()).unwrap(), at: 1, short };
        let error = run(&[4, 5], &mut cache, &mut failing).unwrap_err();
        match error {
            ForwardError::Experts { layer: 1, source } => assert_eq!(source.to_string(), "nobody hosts it"),
            ForwardError::ExpertsShape { layer: 1, expected, found: 3 } => assert_eq!(expected, 2 * 32),
            other => panic!("{other}"),
        }
        assert_eq!(cache.len(), 3);
    }
    let after = run(&[4, 5], &mut cache, &mut local).unwrap();
    let mut fresh = trunk.new_cache();
    assert_eq!(bits(&after[0]), bits(&run(&[1, 2, 3, 4, 5], &mut fresh, &mut local).unwrap()[0]));
}

#[test]
fn impossible_tokens_and_sequences_are_refused() {
    let mut model = Local::open(&fixture("mixtral"));
    let other = Local::open(&fixture("olmoe"));
    let mut cache = model.trunk.new_cache();
    let mut run = |tokens: &[u32], cache: &mut _| {
        let mut segments = [Segment { tokens, cache, logits: LogitsWanted::Last }];
        model.trunk.forward(&mut segments, &mut model.experts)
    };
    assert!(matches!(run(&[1, 256], &mut cache), Err(ForwardError::TokenOutOfRange { token: 256, vocab_size: 256 })));
    assert!(matches!(run(&[], &mut cache), Err(ForwardError::NoTokens)));
    assert!(matches!(run(&[1; 129], &mut cache), Err(ForwardError::ContextExceeded { wanted: 129, max: 128 })));
    assert!(matches!(run(&[1], &mut other.trunk.new_cache()), Err(ForwardError::OtherModelsCache)));
    run(&[1; 128], &mut cache).unwrap();
    assert!(matches!(run(&[1], &mut cache), Err(ForwardError::ContextExceeded { wanted: 129, max: 128 })));
}

#[test]
fn local_experts_add_up_in_ascending_expert_number() {
    let checkpoint = Checkpoint::open(&fixture("olmoe")).unwrap();
    let pool = Arc::new(compute_pool(2).unwrap());
    let mut local = LocalExperts::load(&checkpoint, pool.clone()).unwrap();
    let hidden = noise(2 * 32, 3);
    let routing = Routing { top_k: 2, experts: vec![1, 9, 0, 9], weights: vec![0.3, 0.7, 0.9, 0.2] };
    let found = local.forward(2, &hidden, &routing).unwrap();
    let mut expected = vec![0.0; 2 * 32];
    for row in 0..2 {
        let range = row * 32..(row + 1) * 32;
        for (expert, weight) in routing.row(row) {
            let expert = Expert::load(&checkpoint, 2, expert as usize).unwrap();
            let mut output = vec![0.0; 32];
            let hidden = &hidden[range.clone()];
            run_experts(&mut [ExpertJob { expert: &expert, hidden, output: &mut output }], &pool);
            add_weighted(&mut expected[range.clone()], &output, weight);
        }
    }
    assert_eq!(bits(&found), bits(&expected));
    let beyond = Routing { top_k: 1, experts: vec![16, 0], weights: vec![1.0, 1.0] };
    assert_eq!(local.forward(2, &hidden, &beyond).unwrap_err().to_string(), "no expert 16 in layer 2");
}

/// Waits until another thread has run the experts in the pool that the trunk has too.
struct Elsewhere {
    inner: Option<LocalExperts>,
}

impl Experts for Elsewhere {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let mut inner = self.inner.take().ok_or("in use")?;
        let (hidden, routing) = (hidden.to_vec(), routing.clone());
        let worker = std::thread::spawn(move || {
            let result = inner.forward(layer, &hidden, &routing);
            (inner, result)
        });
        let (inner, result) = worker.join().map_err(|_| "the thread panicked")?;
        self.inner = Some(inner);
        result
    }

    fn are_elsewhere(&self) -> bool {
        true
    }
}

#[test]
fn experts_may_wait_for_the_trunks_own_pool_of_one_thread() {
    let checkpoint = Checkpoint::open(&fixture("qwen2_moe")).unwrap();
    let pool = Arc::new(compute_pool(1).unwrap());
    let trunk = Trunk::load(&checkpoint, pool.clone()).unwrap();
    let mut here = LocalExperts::load(&checkpoint, pool.clone()).unwrap();
    let mut elsewhere = Elsewhere { inner: Some(LocalExperts::load(&checkpoint, pool).unwrap()) };
    let (mut cache, mut own) = (trunk.new_cache(), trunk.new_cache());
    for tokens in [&[1, 2, 3, 4][..], &[5]] {
        let forward = |experts: &mut dyn Experts, cache: &mut _| {
            trunk.forward(&mut [Segment { tokens, cache, logits: LogitsWanted::Last }], experts).unwrap().remove(0)
        };
        // This model has a shared expert, which is computed meanwhile.
        assert_eq!(bits(&forward(&mut elsewhere, &mut cache)), bits(&forward(&mut here, &mut own)));
    }
}
