//! Drafts of a multi-token-prediction head.

use hanse_model::{LogitsWanted, Segment};

use super::*;
use crate::engine::HeadDrafter;

fn core_of(name: &str) -> Arc<Core> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/mtp").join(name);
    Client::local(&ModelConfig { dir, threads: 1 }).unwrap().core().clone()
}

fn drafter(core: &Core) -> HeadDrafter {
    HeadDrafter::new(Arc::new(core.trunk.draft_head().unwrap()))
}

/// Greedy and drawn, with penalties and without, over the fixtures' vocabulary.
fn small_requests() -> Vec<GenerateRequest> {
    let small = |request: GenerateRequest| GenerateRequest {
        prompt: request.prompt.iter().map(|token| token % 94 + 2).collect(),
        ignore_eos: true,
        stop: Vec::new(),
        grammar: None,
        sampling: SamplingParams { logit_bias: Vec::new(), ..request.sampling },
        ..request
    };
    requests().into_iter().map(small).collect()
}

/// A request with drafts of the head, up to six tokens a step, all of which are verified.
fn with_head(core: &Core, drafter: &mut HeadDrafter, request: &GenerateRequest) -> (Vec<Token>, Summary) {
    let rates = Rates::new(64.0);
    run_in(core, core.trunk.new_cache_with_hidden(), request, |sequence, draft| {
        let worth = Worth { drafter: 0, rates: &rates, guesses: [1.0; CLASSES], threshold: 0.0 };
        let room = sequence.draft_room().min(6);
        drafter.propose(core, &mut [sequence.asked(draft, room)], &worth);
        assert_eq!(draft.tokens.len(), room, "as many as were asked for");
        // What it keeps is of true tokens only.
        let memory = sequence.memory_mut();
        let kept = memory.head.as_ref().map_or(0, KvCache::len);
        assert!(kept < sequence.tokens().len() && (room == 0 || kept + 1 == sequence.tokens().len()));
    })
}

#[test]
fn a_head_that_knows_nothing_changes_no_token() {
    for name in ["deepseek_v3", "glm4_moe"] {
        let core = core_of(name);
        let mut drafter = drafter(&core);
        let (mut drafted, mut wrong) = (0, 0);
        for (number, request) in small_requests().iter().enumerate() {
            let found = with_head(&core, &mut drafter, request);
            assert_same(&plain(&core, request), &found, &format!("{name}, request {number}"));
            drafted += found.1.drafts.drafted;
            wrong += found.1.drafts.drafted - found.1.drafts.accepted;
        }
        println!("{name}: {wrong} of {drafted} were wrong");
        assert!(drafted > 200 && wrong * 4 > drafted, "{name}: drafts are rolled back");
    }
}

#[test]
fn a_head_that_gives_the_models_logits_is_always_right() {
    let core = core_of("agreeing");
    let mut drafter = drafter(&core);
    let mut drafted = 0;
    for (number, request) in small_requests().iter().enumerate() {
        let (plain, found) = (plain(&core, request), with_head(&core, &mut drafter, request));
        assert_same(&plain, &found, &format!("request {number}"));
        let use_of = found.1.drafts;
        assert_eq!(use_of.accepted, use_of.drafted, "request {number}");
        // Six and one of its own a step.
        assert_eq!(found.1.timings.decode_steps, plain.1.timings.decode_steps.div_ceil(7), "request {number}");
        drafted += use_of.drafted;
    }
    assert!(drafted > 200, "{drafted}");
}

#[test]
fn several_sequences_are_drafted_for_together_as_alone_and_long_prompts_in_pieces() {
    let core = core_of("deepseek_v3");
    let prompts: [Vec<u32>; 3] = [(2..9).collect(), (0..700).map(|i| i * 31 % 90 + 2).collect(), vec![5, 80, 5, 80]];
    let sequences = || -> Vec<(Sequence, mpsc::Receiver<Step>)> {
        let of = |prompt: &Vec<u32>| {
            let (steps, receiver) = mpsc::channel(STEP_QUEUE);
            let sampling = SamplingParams::greedy();
            let request =
                GenerateRequest { prompt: prompt.clone(), max_tokens: 50, sampling, ..GenerateRequest::default() };
            let (cache, vocab) = (core.trunk.new_cache_with_hidden(), core.trunk.spec().vocab_size);
            let mut sequence = Sequence::new(request, 1024, vocab, cache, None, steps).unwrap();
            let Place::Here(experts) = &core.place else { panic!("a local client") };
            let segment = sequence.segment(prompt.len());
            let logits = core.trunk.forward(&mut [segment], &mut experts.clone()).unwrap().pop().unwrap();
            assert!(matches!(sequence.take(&logits, vocab, &core.defaults), Outcome::GoesOn));
            (sequence, receiver)
        };
        prompts.iter().map(of).collect()
    };
    let rates = Rates::new(64.0);
    let worth = Worth { drafter: 0, rates: &rates, guesses: [1.0; CLASSES], threshold: 0.0 };
    let mut drafter = drafter(&core);
    let propose = |drafter: &mut HeadDrafter, sequences: &mut [(Sequence, mpsc::Receiver<Step>)]| {
        let mut drafts: Vec<Draft> = sequences.iter().map(|_| Draft::default()).collect();
        // One of them wants nothing after the second token.
        let pairs = sequences.iter_mut().zip(&mut drafts).zip([4, 3, 2]);
        let mut asked: Vec<_> = pairs.map(|(((sequence, _), draft), most)| sequence.asked(draft, most)).collect();
        let read = drafter.propose(&core, &mut asked, &worth);
        drop(asked);
        (drafts.into_iter().map(|draft| draft.tokens).collect::<Vec<_>>(), !read.is_zero())
    };
    let (together, read) = propose(&mut drafter, &mut sequences());
    assert!(read, "a long prompt is no price of drafts");
    assert_eq!(together.iter().map(Vec::len).collect::<Vec<_>>(), [4, 3, 2]);
    // What the head gives for all pairs of the long one at once.
    let head = core.trunk.draft_head().unwrap();
    let (sequence, _receiver) = sequences().swap_remove(1);
    let hidden = sequence.cache().hidden(0..700).unwrap();
    let mut cache = head.new_cache();
    let segment = Segment { tokens: &sequence.tokens()[1..], cache: &mut cache, logits: LogitsWanted::Last };
    let logits = head.forward(&mut [segment], hidden).unwrap().logits.remove(0);
    let best = |a: &u32, b: &u32| logits[*a as usize].total_cmp(&logits[*b as usize]);
    assert_eq!((0..logits.len() as u32).max_by(best), Some(together[1][0]));
    // Again without anything new, and after what is kept was given up.
    let mut again = sequences();
    assert_eq!(propose(&mut drafter, &mut again), (together.clone(), true));
    assert_eq!(propose(&mut drafter, &mut again), (together.clone(), false));
    again.iter_mut().for_each(|(sequence, _)| {
        assert!(sequence.draft_bytes() > 0);
        sequence.forget_drafts();
        assert_eq!(sequence.draft_bytes(), 0);
    });
    assert_eq!(propose(&mut drafter, &mut again), (together.clone(), true));
    let mut alone = sequences();
    let alone: Vec<_> = alone
        .iter_mut()
        .zip([4, 3, 2])
        .map(|((sequence, _), most)| {
            let mut draft = Draft::default();
            drafter.propose(&core, &mut [sequence.asked(&mut draft, most)], &worth);
            draft.tokens
        })
        .collect();
    assert_eq!(alone, together);
}

#[test]
fn without_hidden_states_there_is_no_draft() {
    let core = core_of("agreeing");
    let mut drafter = drafter(&core);
    let rates = Rates::new(64.0);
    let request = GenerateRequest { prompt: vec![7, 8], max_tokens: 5, ignore_eos: true, ..GenerateRequest::default() };
    let found = run(&core, &request, |sequence, draft| {
        let worth = Worth { drafter: 0, rates: &rates, guesses: [1.0; CLASSES], threshold: 0.0 };
        drafter.propose(&core, &mut [sequence.asked(draft, 3)], &worth);
        assert!(draft.tokens.is_empty());
    });
    assert_same(&plain(&core, &request), &found, "no drafts");
}
