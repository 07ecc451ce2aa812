//! Carved models: the sum of the slices is the dense layer.

mod common;

use std::path::Path;

use common::{Golden, Local, dense, fixture, json, largest_difference};
use hanse_model::{CarveError, Checkpoint, ExpertParts, carve};
use tempfile::TempDir;

const FILES: [&str; 2] = ["generation_config.json", "tokenizer.json"];

fn carved(dir: &Path, slices: usize) -> (TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("carved");
    let (mut last, checkpoint) = ((0, 1), Checkpoint::open(dir).unwrap());
    carve(&checkpoint, slices, "the dense model", &FILES, &out, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last.0, last.1, "all was told of");
    (folder, out)
}

/// A slice's products are the dense layer's; only the order in which they are added up is another.
#[test]
fn carved_models_give_the_reference_logits_and_greedy_tokens_whatever_the_slices() {
    for dir in dense() {
        let golden = Golden::open(&dir);
        let std = json(&dir.join("golden.json"))["logit_std"].as_f64().unwrap() as f32;
        for slices in [1, 4, 48] {
            let (_folder, out) = carved(&dir, slices);
            let mut model = Local::open(&out);
            assert_eq!(model.trunk.spec().moe_layers().count(), model.trunk.spec().layers.len());
            for n in 0.. {
                let Some(prompt) = golden.ids(&format!("p{n}.input_ids")) else { break };
                let difference =
                    largest_difference(&model.prefill(&prompt), &golden.f32(&format!("p{n}.logits")).unwrap()) / std;
                assert!(difference <= 1e-4, "{} in {slices}: {difference}", dir.display());
                let greedy = golden.ids(&format!("p{n}.greedy_ids")).unwrap();
                assert_eq!(model.greedy(&prompt, greedy.len()), greedy, "{} in {slices}", dir.display());
            }
        }
    }
}

/// One slice is the whole layer, so even the bits are the same.
#[test]
fn a_model_carved_into_one_slice_gives_the_bits_of_the_dense_model() {
    for dir in dense() {
        let prompt = Golden::open(&dir).ids("p1.input_ids").unwrap();
        let (_folder, out) = carved(&dir, 1);
        assert_eq!(Local::open(&out).prefill(&prompt), Local::open(&dir).prefill(&prompt), "{}", dir.display());
    }
}

#[test]
fn a_carved_model_says_what_it_is_and_keeps_dtypes_bytes_and_small_files() {
    let dir = fixture("dense/llama_llama3_long");
    let (_folder, out) = carved(&dir, 4);
    let config = json(&out.join("config.json"));
    assert_eq!(config["carved"], serde_json::json!({ "slices": 4, "from": "the dense model" }));
    assert_eq!(config["model_type"], "llama");
    let (before, after) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&out).unwrap());
    let (before, sizes) = (before.sizes(), after.sizes());
    assert_eq!(before.trunk_bytes, sizes.trunk_bytes + sizes.expert_bytes);
    assert_eq!(sizes.bytes_per_expert[0], 3 * 12 * 32 * 2, "bfloat16");
    let parts = after.weight_map().unwrap().parts;
    assert!(matches!(parts.experts[2], ExpertParts { layer: 2, experts: 4, .. }));
    assert!(parts.trunk.iter().all(|part| !part.name.contains(".mlp.")), "there is no gate");
    let generation = |dir: &Path| std::fs::read(dir.join("generation_config.json")).unwrap();
    assert_eq!(generation(&dir), generation(&out));
    // The same for whoever carves it.
    let (_folder, again) = carved(&dir, 4);
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&again));
}

#[test]
fn what_cannot_be_carved_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("carved");
    let refusal = |dir: &Path, slices: usize| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        carve(&checkpoint, slices, "", &[], &out, &mut |_, _| ()).unwrap_err().to_string()
    };
    let dense = fixture("dense/llama_tied");
    assert_eq!(refusal(&dense, 5), "5 slices do not divide the 48 rows of a feed-forward layer; 4 and 6 do");
    assert_eq!(refusal(&dense, 0), "0 slices do not divide the 48 rows of a feed-forward layer; 1 and 1 do");
    assert_eq!(refusal(&dense, 99), "99 slices do not divide the 48 rows of a feed-forward layer; 48 and 48 do");
    let experts = "the model has experts in layer 0: only dense models are carved";
    assert_eq!(refusal(&fixture("mixtral"), 2), experts);
    assert_eq!(refusal(&carved(&dense, 4).1, 2), experts);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    std::fs::write(&out, "mine").unwrap();
    assert!(refusal(&dense, 4).ends_with("carved exists: give another folder, or remove it"));
    assert_eq!(std::fs::read(&out).unwrap(), b"mine");
    let checkpoint = Checkpoint::open(&dense).unwrap();
    let nowhere = carve(&checkpoint, 4, "", &[], &folder.path().join("no/where"), &mut |_, _| ());
    assert!(matches!(nowhere, Err(CarveError::Write(_))));
}

#[test]
fn a_config_that_was_carved_wrongly_is_refused_by_name() {
    let refusal = |dir: &Path, carved: serde_json::Value| {
        let mut config = json(&dir.join("config.json"));
        config["carved"] = carved;
        hanse_model::tensor_shapes(&config.to_string()).unwrap_err().to_string()
    };
    let dense = fixture("dense/llama_tied");
    let told = refusal(&dense, serde_json::json!({ "slices": 7 }));
    assert_eq!(told, "config.json: `carved.slices` is 7, but it does not divide `intermediate_size` (48)");
    assert_eq!(refusal(&dense, serde_json::json!({ "from": "x" })), "config.json has no `carved.slices`");
    let told = refusal(&dense, serde_json::json!({ "slices": 1u64 << 40 }));
    assert_eq!(told, "config.json: `carved.slices` is 1099511627776, but it must be a whole number from 1 to 4096");
    let told = refusal(&fixture("mixtral"), serde_json::json!({ "slices": 2 }));
    assert!(told.ends_with("this family has experts, and only dense models are carved"), "{told}");
}
