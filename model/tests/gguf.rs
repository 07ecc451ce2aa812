//! GGUF files made by llama.cpp's converter, imported.

mod common;

use std::path::{Path, PathBuf};

use common::{Golden, Local, fixture, json, largest_difference};
use hanse_model::{ChatMessage, Checkpoint, GenerationDefaults, Imported, StoredDtype, Tokenizer, carve, import_gguf};
use safetensors::SafeTensors;
use tempfile::TempDir;

fn imported(path: &Path, to: Option<StoredDtype>) -> (TempDir, PathBuf, Imported) {
    let folder = tempfile::tempdir().unwrap();
    let (out, mut last) = (folder.path().join("model"), (0, 1));
    let found = import_gguf(path, to, &out, &mut |done, total| last = (done, total));
    let found = found.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(last.0 <= last.1 && last.1 == found.bytes, "{last:?}");
    (folder, out, found)
}

fn file(name: &str) -> PathBuf {
    fixture("gguf").join(format!("{name}.gguf"))
}

/// Logits and greedy tokens that transformers computes for the weights in the file.
#[test]
fn every_architecture_gives_the_reference_logits_and_greedy_tokens() {
    // Also as the file has it, and wider than need be.
    let gpt_oss = [None, Some(StoredDtype::F32)].map(|to| ("gpt_oss", "gpt_oss", to));
    let families = [
        ("deepseek2_v2", "deepseek_v2"),
        ("deepseek2_v3", "deepseek_v3"),
        ("deepseek2_whole", "deepseek_v2"),
        ("gpt_oss", "gpt_oss"),
        ("llama", "llama"),
        ("mixtral", "mixtral"),
        ("olmoe", "olmoe"),
        ("qwen2", "qwen2"),
        ("qwen2moe", "qwen2_moe"),
        ("qwen3", "qwen3"),
        ("qwen3moe", "qwen3_moe"),
    ];
    let rounded = families.map(|(name, family)| (name, family, Some(StoredDtype::F16)));
    for (name, family, to) in rounded.into_iter().chain(gpt_oss) {
        let (_folder, out, found) = imported(&file(name), to);
        // One golden for both forms of the same weights.
        let golden = name.replace("_whole", "_v2");
        let golden = Golden::read(&fixture("gguf").join(format!("{golden}.safetensors")));
        let (prompt, expected) = (golden.ids("input_ids").unwrap(), golden.f32("logits").unwrap());
        let mut model = Local::open(&out);
        assert_eq!(model.trunk.spec().family, family);
        let mean = expected.iter().sum::<f32>() / expected.len() as f32;
        let std = (expected.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
        let difference = largest_difference(&model.prefill(&prompt), &expected) / std;
        println!("{name:15} {to:?}, {} tensors, logits {difference:.2e} std", found.tensors);
        assert!(difference <= 1e-4, "{name}: {difference}");
        let greedy = golden.ids("greedy_ids").unwrap();
        assert_eq!(model.greedy(&prompt, greedy.len()), greedy, "{name}");
    }
}

/// All tensors of a folder's file.
fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

/// Bytes of tensors by name, of which there must be some.
fn named(bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let mut found: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| wanted(name))
        .map(|(name, view)| (name.to_owned(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

/// What the converter cuts in two is as it was, whichever form the file has.
#[test]
fn what_makes_keys_and_values_of_latents_is_joined_bit_for_bit() {
    let is_joined = |name: &str| name.ends_with("kv_b_proj.weight");
    for name in ["deepseek2_v2", "deepseek2_v3"] {
        let (_folder, out, _) = imported(&file(name), None);
        let golden = std::fs::read(fixture("gguf").join(format!("{name}.safetensors"))).unwrap();
        let bytes = |(name, _, data)| (name, data);
        let (ours, theirs) = (named(&weights(&out), is_joined), named(&golden, is_joined));
        assert_eq!(ours.len(), 2, "{name}: one for each layer");
        assert!(ours.into_iter().map(bytes).eq(theirs.into_iter().map(bytes)), "{name}");
    }
    let (_newer, newer, _) = imported(&file("deepseek2_v2"), None);
    let (_older, older, _) = imported(&file("deepseek2_whole"), None);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(std::fs::read(newer.join(name)).unwrap() == std::fs::read(older.join(name)).unwrap(), "{name}");
    }
}

/// The config says what the one said that the file was made of.
#[test]
fn models_are_what_they_were_before_they_were_converted() {
    for (name, source) in [("deepseek2_v2", "deepseek_v2"), ("deepseek2_v3", "deepseek_v3")] {
        let (_folder, out, _) = imported(&file(name), None);
        let (ours, theirs) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&fixture(source)).unwrap());
        // The file has the first layers only.
        let mut theirs = theirs.spec().clone();
        theirs.layers.truncate(2);
        assert_eq!(*ours.spec(), theirs, "{name}");
    }
}

/// Experts of gpt-oss are in the file in another order, and in the folder in that of the hub.
#[test]
fn microscaled_blocks_are_kept_bit_for_bit() {
    let (_folder, out, found) = imported(&file("gpt_oss"), None);
    assert_eq!(found.types["MXFP4"], 6, "{:?}", found.types);
    let golden = std::fs::read(fixture("gguf/gpt_oss.safetensors")).unwrap();
    let is_microscaled = |name: &str| name.ends_with("_blocks") || name.ends_with("_scales");
    let (ours, theirs) = (named(&weights(&out), is_microscaled), named(&golden, is_microscaled));
    assert_eq!(ours.len(), 8);
    assert!(ours == theirs);
    assert_eq!(json(&out.join("config.json"))["quantization_config"]["quant_method"], "mxfp4");
    // Nothing of it is left where it was asked for something else.
    let (_folder, out, _) = imported(&file("gpt_oss"), Some(StoredDtype::Bf16));
    assert!(SafeTensors::deserialize(&weights(&out)).unwrap().names().iter().all(|name| !is_microscaled(name)));
    assert!(json(&out.join("config.json")).get("quantization_config").is_none());
}

/// Matrices in Q8_0 are computed as they lie.
#[test]
fn blocks_that_are_computed_as_they_lie_are_kept() {
    let (_folder, kept_in, found) = imported(&file("qwen2_blocks"), None);
    let (_other, widened, _) = imported(&file("qwen2_blocks"), Some(StoredDtype::F32));
    let parts = Checkpoint::open(&kept_in).unwrap().weight_map().unwrap().parts.trunk;
    let in_blocks = parts.iter().filter(|part| part.dtype == StoredDtype::Q8_0).count();
    assert_eq!(in_blocks, found.types["Q8_0"], "{:?}", found.types);
    assert!(parts.iter().any(|part| part.dtype == StoredDtype::F16), "what was in other blocks");
    let logits = |dir: &Path| Local::open(dir).prefill(&[3, 1, 4, 1, 5]);
    let (kept, widened) = (logits(&kept_in), logits(&widened));
    let size = widened.iter().fold(0.0f32, |size, value| size.max(value.abs()));
    // Such a folder is carved too, where feed-forward layers hold no blocks.
    let (folder, dense) = (tempfile::tempdir().unwrap(), Checkpoint::open(&kept_in).unwrap());
    let out = folder.path().join("carved");
    carve(&dense, 2, "a GGUF file", &[], &out, &mut |_, _| ()).unwrap();
    assert!(largest_difference(&logits(&out), &kept) < 1e-4 * size);
    // The others were rounded to f16.
    assert!(largest_difference(&kept, &widened) < 1e-2 * size);
}

/// One file has blocks, the other what gguf-py says that they stand for.
#[test]
fn blocks_become_the_values_that_they_stand_for() {
    let (_folder, blocks, found) = imported(&file("qwen2_blocks"), Some(StoredDtype::F32));
    let (_other, widened, _) = imported(&file("qwen2_widened"), Some(StoredDtype::F32));
    assert!(["Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1"].iter().all(|kind| found.types[kind] > 0), "{:?}", found.types);
    assert!(weights(&blocks) == weights(&widened));
    for (to, bytes) in [(StoredDtype::F16, 2), (StoredDtype::Bf16, 2), (StoredDtype::F32, 4)] {
        let (_folder, out, _) = imported(&file("qwen2_blocks"), Some(to));
        let parts = Checkpoint::open(&out).unwrap().weight_map().unwrap().parts;
        let embedding = parts.trunk.iter().find(|part| part.name == "model.embed_tokens.weight").unwrap();
        assert_eq!((embedding.dtype, embedding.dtype.bytes(1)), (to, Some(bytes)));
        let norm = parts.trunk.iter().find(|part| part.name == "model.norm.weight").unwrap();
        assert_eq!(norm.dtype, StoredDtype::F32, "as stored");
    }
}

#[test]
fn the_same_file_gives_the_same_folder() {
    let (_one, one, _) = imported(&file("qwen3moe"), Some(StoredDtype::F16));
    let (_two, two, _) = imported(&file("qwen3moe"), Some(StoredDtype::F16));
    let mut names: Vec<_> = std::fs::read_dir(&one).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names, expected);
    for name in names {
        assert!(std::fs::read(one.join(&name)).unwrap() == std::fs::read(two.join(&name)).unwrap(), "{name:?}");
    }
}

/// Encodings and chats of the tokenizers that the files were made with.
#[test]
fn tokenizers_are_those_that_the_file_was_made_with() {
    for (name, source) in [("qwen3moe", "qwen3_moe"), ("olmoe", "olmoe")] {
        let (_folder, out, found) = imported(&file(name), Some(StoredDtype::F16));
        assert!(found.chat_template);
        let (tokenizer, golden) =
            (Tokenizer::load(&out).unwrap(), json(&fixture(source).join("tokenizer_golden.json")));
        let ids = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        for case in golden["encode"].as_array().unwrap() {
            let encoded =
                tokenizer.encode(&text(&case["text"]), case["add_special_tokens"].as_bool().unwrap()).unwrap();
            assert_eq!(encoded, ids(&case["ids"]), "{name}: {}", case["text"]);
            assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text(&case["decoded"]), "{name}");
            assert_eq!(tokenizer.decode(&encoded, true).unwrap(), text(&case["decoded_skip_special"]), "{name}");
        }
        let template = tokenizer.chat_template().unwrap().unwrap();
        for case in golden["chat"].as_array().unwrap() {
            let messages: Vec<ChatMessage> = serde_json::from_value(case["messages"].clone()).unwrap();
            let rendered = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(rendered, text(&case["rendered"]), "{name}");
            assert_eq!(tokenizer.encode(&rendered, false).unwrap(), ids(&case["ids"]), "{name}");
        }
        let (ours, theirs) =
            (GenerationDefaults::load(&out).unwrap(), GenerationDefaults::load(&fixture(source)).unwrap());
        assert!(theirs.eos_token_ids.iter().all(|id| ours.eos_token_ids.contains(id)), "{name}: {ours:?} {theirs:?}");
    }
}

/// What the tokenizer made of texts that the file was made with, in the way of o200k.
#[test]
fn the_tokenizer_of_gpt_oss_cuts_texts_as_the_one_it_was_made_of() {
    let (_folder, out, found) = imported(&file("gpt_oss"), None);
    assert!(found.tokenizer == "gpt2, gpt-4o" && found.chat_template, "{found:?}");
    let tokenizer = Tokenizer::load(&out).unwrap();
    for case in json(&fixture("gguf/gpt_oss.json")).as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap(), "{text:?}");
    }
    let message = ChatMessage { role: "user".to_owned(), content: "Hi.".to_owned() };
    let rendered = tokenizer.chat_template().unwrap().unwrap().render(&[message], true).unwrap();
    assert_eq!(rendered, "<|start|>user<|message|>Hi.<|end|><|start|>assistant");
    // An answer ends where the model returns or calls, and not at the end of a message.
    let token =
        |text: &str| tokenizer.encode(text, false).unwrap()[..].try_into().map(|[token]: [u32; 1]| token).unwrap();
    let mut ends = GenerationDefaults::load(&out).unwrap().eos_token_ids;
    ends.sort_unstable();
    assert_eq!(ends, ["<|endoftext|>", "<|return|>", "<|call|>"].map(token));
}

/// What SentencePiece itself makes of texts.
#[test]
fn sentence_piece_vocabularies_cut_texts_as_sentence_piece_does() {
    let (_folder, out, found) = imported(&file("llama_sentencepiece"), Some(StoredDtype::F16));
    assert_eq!(found.tokenizer, "llama");
    let tokenizer = Tokenizer::load(&out).unwrap();
    for case in json(&fixture("gguf/llama_sentencepiece.json")).as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        // SentencePiece puts no space before nothing; what is before nothing matters to nobody.
        if !text.is_empty() {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        }
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), case["decoded"].as_str().unwrap(), "{text:?}");
    }
}
