//! Whatever is drafted, what comes is what comes without drafts.

mod head;

use std::path::PathBuf;
use std::sync::Arc;

use hanse_model::{Checkpoint, KvCache, LocalExperts, SamplingParams, compute_pool};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;

use super::super::sequence::{Outcome, Sequence};
use super::super::{STEP_QUEUE, Step};
use super::window::{CLASSES, Rates};
use super::{Draft, DraftModel, Drafter, Lookup, ModelDrafter, Worth};
use crate::client::{Client, Core, ModelConfig, Place, Summary};
use crate::generate::{Constraint, FinishReason, GenerateRequest, Grammar, Token};

fn core() -> Arc<Core> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-moe");
    Client::local(&ModelConfig { dir, threads: 1 }).unwrap().core().clone()
}

/// What becomes of a request where `draft` says what is drafted, and all of it is verified.
fn run(core: &Core, request: &GenerateRequest, draft: impl FnMut(&mut Sequence, &mut Draft)) -> (Vec<Token>, Summary) {
    run_in(core, core.trunk.new_cache(), request, draft)
}

/// The same in an empty cache.
fn run_in(
    core: &Core,
    cache: KvCache,
    request: &GenerateRequest,
    mut draft: impl FnMut(&mut Sequence, &mut Draft),
) -> (Vec<Token>, Summary) {
    let (steps, mut receiver) = mpsc::channel(STEP_QUEUE);
    let (vocab, context) = (core.trunk.spec().vocab_size, core.trunk.spec().max_positions);
    let tokenizer = core.tokenizer.as_ref();
    let mut sequence = Sequence::new(request.clone(), context, vocab, cache, tokenizer, steps).unwrap();
    let Place::Here(experts) = &core.place else { panic!("a local client") };
    let mut tokens = Vec::new();
    loop {
        if sequence.is_decoding() {
            let mut drafted = Draft::default();
            draft(&mut sequence, &mut drafted);
            let room = sequence.draft_room();
            drafted.tokens.truncate(room);
            drafted.verified = drafted.tokens.len();
            drafted.classes.resize(drafted.verified, 0);
            *sequence.draft_mut() = drafted;
        }
        let rows = sequence.pending() + sequence.drafted_rows();
        let segment = sequence.segment(rows);
        let logits = core.trunk.forward(&mut [segment], &mut experts.clone()).unwrap().pop().unwrap();
        let before = sequence.tokens().len();
        let outcome = sequence.take(&logits, vocab, &core.defaults);
        sequence.judge(sequence.tokens().len() - before);
        while let Ok(Step::Token(token, _)) = receiver.try_recv() {
            tokens.push(token);
        }
        match outcome {
            Outcome::GoesOn => assert_eq!(sequence.cache().len(), sequence.tokens().len() - 1, "drafts leave nothing"),
            Outcome::Ended(end) => return (tokens, end.unwrap()),
        }
    }
}

fn plain(core: &Core, request: &GenerateRequest) -> (Vec<Token>, Summary) {
    run(core, request, |_, _| ())
}

/// The same tokens, text, probabilities and end, and drafts that were accepted as `expected`, if that is said.
fn assert_same(plain: &(Vec<Token>, Summary), found: &(Vec<Token>, Summary), what: &str) {
    assert_eq!(found.0, plain.0, "{what}");
    assert_eq!((found.1.finish_reason, &found.1.rest), (plain.1.finish_reason, &plain.1.rest), "{what}");
    assert_eq!(found.1.timings.decode_tokens, plain.1.timings.decode_tokens, "{what}");
    let ids = |tokens: &[Token]| tokens.iter().map(|token| token.logprob.to_bits()).collect::<Vec<_>>();
    assert_eq!(ids(&found.0), ids(&plain.0), "{what}: bits");
}

/// Only every third token may come, and which ones goes round; ends after twelve.
#[derive(Debug)]
struct Thirds;

struct InThirds(u32);

impl Grammar for Thirds {
    fn begin(&self) -> Result<Box<dyn Constraint>, String> {
        Ok(Box::new(InThirds(0)))
    }
}

impl Constraint for InThirds {
    fn allowed(&mut self) -> Result<Vec<u32>, String> {
        let wanted = |token: &u32| if self.0 == 12 { *token == 0 } else { token % 3 == self.0 % 3 };
        let mut words = vec![0; 4096 / 32];
        (0..4096u32).filter(wanted).for_each(|token| words[token as usize / 32] |= 1 << (token % 32));
        Ok(words)
    }

    fn accept(&mut self, _: u32) -> Result<(), String> {
        self.0 += 1;
        Ok(())
    }
}

/// Requests of every kind that the sampler and the end of an answer know.
fn requests() -> Vec<GenerateRequest> {
    let prompt = |n: u32| (0..5 + n % 4).map(|i| (i * 311 + n * 97 + 1) % 1700).collect::<Vec<u32>>();
    let mut all = Vec::new();
    for n in 0..24 {
        let sampling = SamplingParams {
            temperature: [0.0, 0.7, 1.0, 1.6][n as usize % 4],
            top_k: [None, Some(40), None][n as usize % 3],
            top_p: [None, None, None, Some(0.9), None][n as usize % 5],
            seed: u64::from(n) * 7 + 1,
            presence_penalty: [0.0, 0.6][n as usize / 4 % 2],
            frequency_penalty: [0.0, 0.0, 0.9][n as usize / 3 % 3],
            logit_bias: if n % 6 == 5 { vec![(17, 4.0), (300, -9.0)] } else { Vec::new() },
        };
        all.push(GenerateRequest {
            prompt: prompt(n),
            max_tokens: 1 + (n as usize * 11) % 37,
            sampling,
            ignore_eos: n % 2 == 0,
            top_logprobs: n as usize % 3,
            stop: if n % 4 == 1 { vec!["the".to_owned(), "e s".to_owned()] } else { Vec::new() },
            grammar: (n % 5 == 4).then(|| Arc::new(Thirds) as Arc<dyn Grammar>),
            ..GenerateRequest::default()
        });
    }
    all
}

#[test]
fn true_and_false_drafts_of_any_length_change_nothing() {
    let core = core();
    for (number, request) in requests().iter().enumerate() {
        let plain = plain(&core, request);
        let all: Vec<u32> = request.prompt.iter().copied().chain(plain.0.iter().map(|token| token.id)).collect();
        let mut rng = StdRng::seed_from_u64(number as u64);
        let what_comes = |sequence: &Sequence| all[sequence.tokens().len()..].to_vec();
        let perfect = run(&core, request, |sequence, draft| draft.tokens = what_comes(sequence));
        assert_same(&plain, &perfect, &format!("request {number}, all right"));
        let (drafted, accepted) = (perfect.1.drafts.drafted, perfect.1.drafts.accepted);
        assert_eq!(drafted, accepted);
        let steps = plain.1.timings.decode_steps;
        assert!(
            perfect.1.timings.decode_steps <= steps.div_ceil(2),
            "{} of {steps} steps",
            perfect.1.timings.decode_steps
        );
        let wrong = run(&core, request, |sequence, draft| {
            draft.tokens = what_comes(sequence).into_iter().map(|token| (token + 1) % 4096).collect();
        });
        assert_same(&plain, &wrong, &format!("request {number}, all wrong"));
        assert_eq!(wrong.1.drafts.accepted, 0);
        let mixed = run(&core, request, |sequence, draft| {
            draft.tokens = what_comes(sequence);
            let length = rng.random_range(0..12);
            // Also longer than the answer, with the end of the text in the middle.
            draft.tokens.resize(length, 0);
            for token in &mut draft.tokens {
                if rng.random_bool(0.2) {
                    *token = rng.random_range(0..4096);
                }
            }
        });
        assert_same(&plain, &mixed, &format!("request {number}, some right"));
    }
    let reasons: Vec<_> = requests().iter().map(|request| plain(&core, request).1.finish_reason).collect();
    assert!(reasons.contains(&FinishReason::Stop) && reasons.contains(&FinishReason::Length), "both ends are tested");
}

#[test]
fn no_drafter_changes_anything_and_a_model_drafts_well_for_itself() {
    let core = core();
    let itself = || {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-moe");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let pool = Arc::new(compute_pool(1).unwrap());
        let trunk = hanse_model::Trunk::load(&checkpoint, pool.clone()).unwrap();
        let experts = Arc::new(LocalExperts::load(&checkpoint, pool).unwrap());
        ModelDrafter::of(Arc::new(DraftModel { trunk, experts }))
    };
    let drafters: [Box<dyn Drafter>; 2] = [Box::new(Lookup), Box::new(itself())];
    for (kind, mut drafter) in drafters.into_iter().enumerate() {
        let rates = Rates::new(64.0);
        let (mut drafted, mut accepted) = (0, 0);
        for (number, request) in requests().iter().enumerate() {
            let found = run(&core, request, |sequence, draft| {
                let worth = Worth { drafter: 0, rates: &rates, guesses: [1.0; CLASSES], threshold: 0.0 };
                let room = sequence.draft_room().min(6);
                drafter.propose(&core, &mut [sequence.asked(draft, room)], &worth);
            });
            assert_same(&plain(&core, request), &found, &format!("drafter {kind}, request {number}"));
            if request.grammar.is_none() {
                drafted += found.1.drafts.drafted;
                accepted += found.1.drafts.accepted;
            }
        }
        println!("drafter {kind}: {accepted} of {drafted}");
        // The same model, the same random numbers: all of it comes, drawn or not, but for what is drafted beyond an answer's end.
        assert!(drafted > 0 && (kind == 0 || accepted * 20 > drafted * 19), "drafter {kind}: {accepted} of {drafted}");
    }
}

#[test]
fn drawn_tokens_have_the_models_distribution_with_drafts_that_prefer_others() {
    let core = core();
    // Of four tokens, one after the other, with a draft that always says the same two.
    let sampling = |seed| SamplingParams { temperature: 5.0, top_k: Some(4), seed, ..SamplingParams::default() };
    let request = |seed| GenerateRequest {
        prompt: vec![707, 625, 259],
        max_tokens: 3,
        sampling: sampling(seed),
        ignore_eos: true,
        top_logprobs: 4,
        ..GenerateRequest::default()
    };
    let likely: Vec<u32> = plain(&core, &request(0)).0.iter().map(|token| token.id).collect();
    // By the tokens before: how often each of the four came, and how likely it is.
    let mut found: std::collections::BTreeMap<u32, Vec<(u32, f64, u32)>> = std::collections::BTreeMap::new();
    let seeds = 700;
    for seed in 0..seeds {
        let (tokens, _) = run(&core, &request(seed), |sequence, draft| {
            draft.tokens = likely[sequence.tokens().len() - 3..].to_vec();
        });
        // The second token: a row that was drafted for, after a first one that was drawn.
        let weights: Vec<f64> = tokens[1].top.iter().map(|(_, log)| (f64::from(*log) / 5.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        let cells = found.entry(tokens[0].id).or_insert_with(|| {
            tokens[1].top.iter().zip(&weights).map(|((id, _), weight)| (*id, weight / total, 0)).collect()
        });
        cells.iter_mut().filter(|(id, ..)| *id == tokens[1].id).for_each(|(.., count)| *count += 1);
    }
    let (mut chi_square, mut freedom) = (0.0, 0);
    for cells in found.values() {
        let count: u32 = cells.iter().map(|(.., count)| count).sum();
        for (_, chance, seen) in cells {
            let expected = chance * f64::from(count);
            chi_square += (f64::from(*seen) - expected).powi(2) / expected;
        }
        freedom += cells.len() - 1;
    }
    println!("chi-square {chi_square:.1} with {freedom} degrees of freedom");
    // The mean is the number of degrees, the variance twice that: four deviations above.
    let mean = freedom as f64;
    assert!(freedom >= 9 && chi_square < mean + 4.0 * (2.0 * mean).sqrt(), "{chi_square} with {freedom}");
}
