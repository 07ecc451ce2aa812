//! Multi-token-prediction heads: the logits of another implementation, and what is refused.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{Golden, Local, argmax, bits, fixture, json, largest_difference};
use hanse_model::{
    Checkpoint, CheckpointError, DraftHead, ForwardError, KvCache, LogitsWanted, Mapping, Part, PartSource, Precision,
    Segment, StoredDtype, compute_pool, quantise_folder,
};

fn cases() -> [PathBuf; 2] {
    ["mtp/deepseek_v3", "mtp/glm4_moe"].map(fixture)
}

/// The model's last hidden states of a prompt, all but the last one's, `[tokens - 1, hidden]`.
fn states(model: &mut Local, prompt: &[u32]) -> Vec<f32> {
    let mut cache = model.trunk.new_cache_with_hidden();
    model.forward(prompt, &mut cache, LogitsWanted::None);
    cache.hidden(0..prompt.len() - 1).unwrap().to_vec()
}

/// Logits and the head's own hidden states.
fn run(
    head: &DraftHead,
    cache: &mut KvCache,
    tokens: &[u32],
    hidden: &[f32],
    logits: LogitsWanted,
) -> (Vec<f32>, Vec<f32>) {
    let mut output = head.forward(&mut [Segment { tokens, cache, logits }], hidden).unwrap();
    (output.logits.remove(0), output.hidden.remove(0))
}

#[test]
fn a_head_gives_the_reference_logits_and_goes_on_from_its_own() {
    for dir in cases() {
        let (golden, about) = (Golden::open(&dir), json(&dir.join("golden.json")));
        let std = about["logit_std"].as_f64().unwrap() as f32;
        let mut model = Local::open(&dir);
        let head = model.trunk.draft_head().unwrap();
        for n in 0..2 {
            let prompt = golden.ids(&format!("p{n}.input_ids")).unwrap();
            let states = states(&mut model, &prompt);
            let mut cache = head.new_cache();
            let (logits, hidden) = run(&head, &mut cache, &prompt[1..], &states, LogitsWanted::All);
            let expected = golden.f32(&format!("p{n}.logits")).unwrap();
            let worst = largest_difference(&logits, &expected) / std;
            // Its own tokens and hidden states, one after another.
            let vocab = model.trunk.spec().vocab_size;
            let width = model.trunk.spec().hidden_size;
            let mut last = (logits[logits.len() - vocab..].to_vec(), hidden[hidden.len() - width..].to_vec());
            let (mut tokens, mut drafted) = (Vec::new(), Vec::new());
            let ids = golden.ids(&format!("p{n}.draft_ids")).unwrap();
            while tokens.len() < ids.len() {
                tokens.push(argmax(&last.0));
                drafted.extend(&last.0);
                last = run(&head, &mut cache, &tokens[tokens.len() - 1..], &last.1, LogitsWanted::Last);
            }
            assert_eq!(tokens, ids, "{}: p{n}", dir.display());
            let expected = golden.f32(&format!("p{n}.draft_logits")).unwrap();
            let worst = worst.max(largest_difference(&drafted, &expected) / std);
            println!("{}: p{n} {worst:.2e} std", dir.display());
            assert!(worst <= 1e-4, "{}: logits differ by {worst} std", dir.display());
        }
    }
}

#[test]
fn pairs_at_once_one_by_one_and_of_several_sequences_give_the_same_bits() {
    for dir in cases() {
        let golden = Golden::open(&dir);
        let mut model = Local::open(&dir);
        let head = model.trunk.draft_head().unwrap();
        let width = model.trunk.spec().hidden_size;
        let prompts = [0, 1].map(|n| golden.ids(&format!("p{n}.input_ids")).unwrap());
        let states = prompts.each_ref().map(|prompt| states(&mut model, prompt));
        let at_once: Vec<_> = prompts
            .iter()
            .zip(&states)
            .map(|(prompt, states)| run(&head, &mut head.new_cache(), &prompt[1..], states, LogitsWanted::All))
            .collect();
        let mut cache = head.new_cache();
        let mut one_by_one = Vec::new();
        for (token, state) in prompts[1][1..].chunks(1).zip(states[1].chunks(width)) {
            one_by_one.extend(run(&head, &mut cache, token, state, LogitsWanted::Last).0);
        }
        assert_eq!(bits(&one_by_one), bits(&at_once[1].0));
        // What was guessed is taken back.
        cache.truncate(2);
        let again = run(&head, &mut cache, &prompts[1][3..], &states[1][2 * width..], LogitsWanted::Last);
        assert_eq!(bits(&again.0), bits(&at_once[1].0[at_once[1].0.len() - again.0.len()..]));
        let mut caches = [head.new_cache(), head.new_cache()];
        let mut segments: Vec<Segment<'_>> = caches
            .iter_mut()
            .zip(&prompts)
            .map(|(cache, prompt)| Segment { tokens: &prompt[1..], cache, logits: LogitsWanted::All })
            .collect();
        let together = head.forward(&mut segments, &states.concat()).unwrap();
        for (n, (logits, hidden)) in at_once.iter().enumerate() {
            assert_eq!((bits(&together.logits[n]), bits(&together.hidden[n])), (bits(logits), bits(hidden)));
        }
    }
}

#[test]
fn hidden_states_are_the_same_bits_however_a_prompt_is_cut_and_cost_no_other_cache_anything() {
    let mut model = Local::open(&cases()[0]);
    let prompt: Vec<u32> = (2..40).collect();
    let at_once = states(&mut model, &prompt);
    let mut cache = model.trunk.new_cache_with_hidden();
    prompt.chunks(7).for_each(|tokens| drop(model.forward(tokens, &mut cache, LogitsWanted::Last)));
    assert_eq!(bits(cache.hidden(0..prompt.len() - 1).unwrap()), bits(&at_once));
    let (mut plain, width) = (model.trunk.new_cache(), model.trunk.spec().hidden_size);
    model.forward(&prompt, &mut plain, LogitsWanted::None);
    assert_eq!(cache.bytes_per_position() - plain.bytes_per_position(), width * 4);
    assert_eq!(plain.hidden(0..1), None);
}

#[test]
fn what_cannot_be_is_refused() {
    let model = Local::open(&cases()[0]);
    let head = model.trunk.draft_head().unwrap();
    let (vocab, width) = (model.trunk.spec().vocab_size, model.trunk.spec().hidden_size);
    let run = |tokens: &[u32], hidden: usize, cache: &mut KvCache| {
        let segment = Segment { tokens, cache, logits: LogitsWanted::Last };
        head.forward(&mut [segment], &vec![0.5; hidden]).unwrap_err()
    };
    let mut cache = head.new_cache();
    assert!(matches!(run(&[2], width - 1, &mut cache), ForwardError::HiddenStates { found: 31, expected: 32 }));
    assert!(matches!(run(&[vocab as u32], width, &mut cache), ForwardError::TokenOutOfRange { .. }));
    assert!(matches!(run(&[], 0, &mut cache), ForwardError::NoTokens));
    assert!(matches!(run(&[2], width, &mut model.trunk.new_cache()), ForwardError::OtherModelsCache));
    assert!(cache.is_empty() && cache.bytes() == 0);
}

/// A copy of the first case with another config, whose weights are `weights`.
fn folder(change: impl Fn(&mut serde_json::Value), weights: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json(&cases()[0].join("config.json"));
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    dir
}

/// The first case's tensors that `keep` keeps.
fn weights(keep: impl Fn(&str) -> bool) -> Vec<u8> {
    let bytes = std::fs::read(cases()[0].join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    safetensors::serialize(tensors.tensors().into_iter().filter(|(name, _)| keep(name)), None).unwrap()
}

#[test]
fn a_checkpoint_without_a_head_says_what_is_missing_and_is_complete() {
    let refused = |dir: &std::path::Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let error = checkpoint.check_draft_head().unwrap_err();
        assert!(matches!(error, CheckpointError::NoDraftHead { .. }), "{error}");
        let trunk = hanse_model::Trunk::load(&checkpoint, Arc::new(compute_pool(1).unwrap())).unwrap();
        assert_eq!(trunk.draft_head().unwrap_err().to_string(), error.to_string());
        error.to_string()
    };
    assert!(refused(&fixture("mixtral")).contains("family `mixtral`"));
    assert!(refused(&fixture("deepseek_v3")).contains("num_nextn_predict_layers"));
    // Its config speaks of one that is not there.
    let error = refused(&fixture("glm4_moe"));
    assert!(error.contains("`model.layers.3.self_attn.q_proj.weight` is missing"), "{error}");
    for tensor in ["eh_proj", "shared_head.norm", "mlp.experts.5.down_proj", "self_attn.kv_b_proj"] {
        let name = format!("model.layers.2.{tensor}.weight");
        let dir = folder(|_| (), &weights(|found| found != name));
        assert!(refused(dir.path()).contains(&format!("`{name}` is missing")));
    }
    // What the head shares with the model in some checkpoints may be absent.
    let shared = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"];
    let dir = folder(|_| (), &weights(|name| !shared.contains(&name)));
    Checkpoint::open(dir.path()).unwrap().check_draft_head().unwrap();
    let other = folder(|config| config["num_nextn_predict_layers"] = 2000.into(), &weights(|_| true));
    let error = Checkpoint::open(other.path()).unwrap().check_draft_head().unwrap_err().to_string();
    assert!(error.contains("num_nextn_predict_layers"), "{error}");
}

#[test]
fn a_head_is_no_part_of_the_model() {
    for dir in cases() {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!(checkpoint.spec().layers.len(), 2);
        let parts = checkpoint.weight_map().unwrap().parts;
        assert!(parts.trunk.iter().all(|part| !part.name.starts_with("model.layers.2.")));
        assert_eq!(parts.experts.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [1]);
        assert_eq!(checkpoint.sizes().bytes_per_expert.len(), 2);
    }
}

#[test]
fn a_folder_that_is_written_again_keeps_its_head() {
    for dir in cases() {
        let out = tempfile::tempdir().unwrap();
        let to = out.path().join("again");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let precision = Precision { experts: StoredDtype::F32, trunk: Some(StoredDtype::F32) };
        quantise_folder(&checkpoint, precision, &"0".repeat(64), &[], &to, &mut |_, _| ()).unwrap();
        assert_eq!(Checkpoint::open(&to).unwrap().spec(), checkpoint.spec());
        let prompt: Vec<u32> = (2..20).collect();
        let [logits, again] = [&dir, &to].map(|dir| {
            let mut model = Local::open(dir);
            let (head, states) = (model.trunk.draft_head().unwrap(), states(&mut model, &prompt));
            run(&head, &mut head.new_cache(), &prompt[1..], &states, LogitsWanted::All).0
        });
        assert_eq!(bits(&again), bits(&logits));
    }
}

/// Gives nothing.
#[derive(Debug)]
struct Nowhere;

impl PartSource for Nowhere {
    fn open(&self, part: Part<'_>) -> Result<Arc<Mapping>, Box<dyn std::error::Error + Send + Sync>> {
        Err(format!("{part} is wanted").into())
    }
}

#[test]
fn what_is_had_part_by_part_has_no_head_and_says_so_before_anything_is_fetched() {
    let checkpoint = Checkpoint::open(&cases()[0]).unwrap();
    let (text, parts) = (checkpoint.config_text().to_owned(), checkpoint.weight_map().unwrap().parts);
    let in_parts = Checkpoint::from_parts(&cases()[0], text, parts, Arc::new(Nowhere)).unwrap();
    let error = in_parts.check_draft_head().unwrap_err().to_string();
    assert!(error.contains("give a model folder that has it"), "{error}");
}
