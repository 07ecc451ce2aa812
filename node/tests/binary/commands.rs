//! Commands that compute: the same here as over a network, and as the reference says.

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::{Node, document, document_of, home, root, run, text, tiny_moe, waits_for};

const PROMPT: &str = "Once upon a time, there was a little fox named Pip.";

/// The bundled model's reference: prompts with greedy tokens.
fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(tiny_moe().join("golden.json")).unwrap()).unwrap()
}

fn model_args(command: &str) -> Vec<String> {
    vec![command.into(), "--json".into(), "--model".into(), tiny_moe().to_str().unwrap().into()]
}

fn with<'a>(command: &str, more: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    model_args(command).into_iter().chain(more.into_iter().map(str::to_owned)).collect()
}

#[test]
fn inspect_tells_trunk_from_experts() {
    let report = document(model_args("inspect"));
    let expert_bytes = 16 * 6 * 3 * 128 * 192 * 2u64;
    assert_eq!(report["family"], "qwen3_moe");
    for (field, value) in [("layers", 6), ("moe_layers", 6), ("hidden_size", 192), ("experts", 16), ("top_k", 2)] {
        assert_eq!(report[field], value, "{field}");
    }
    assert_eq!(report["expert_bytes"], expert_bytes);
    let file = std::fs::metadata(tiny_moe().join("model.safetensors")).unwrap().len();
    let whole = report["trunk_bytes"].as_u64().unwrap() + expert_bytes;
    assert!(whole < file && file - whole < 64 << 10, "all but the file's header: {whole} of {file}");
}

#[test]
fn greedy_text_is_the_references_here_and_over_a_network() {
    let nodes = Node::halves();
    let prompt = &golden()["prompts"][0];
    let greedy = ["--prompt", PROMPT, "--max-tokens", "48", "--ignore-eos", "--temperature", "0"];
    let here = document(with("generate", greedy.into_iter().chain(["--local"])));
    let address = nodes[1].address();
    let there = document(with("generate", greedy.into_iter().chain(["--bootstrap", &address])));
    for found in [&here, &there] {
        assert_eq!(found["prompt_tokens"], prompt["input_ids"]);
        assert_eq!(found["tokens"], prompt["greedy_ids"]);
        assert_eq!(found["text"], prompt["greedy_text"]);
        assert_eq!(found["finish_reason"], "length");
        for field in ["prefill_ms", "decode_ms", "tokens_per_second"] {
            assert!(found["timings"][field].as_f64().unwrap() > 0.0, "{field}");
        }
    }
    assert_eq!(here["logprobs"], there["logprobs"], "to the bit");
    let network = &there["network"];
    assert_eq!(network["peers"], 2);
    // One for each layer of each pass, and a pass for each token but for those that were drafted.
    let accepted = there["drafts"]["accepted"].as_u64().unwrap();
    assert_eq!(network["round_trips"].as_u64().unwrap(), (48 - accepted) * 6, "{}", there["drafts"]);
    assert!(network["frames"].as_u64().unwrap() >= (48 - accepted) * 6);
    assert!(network["bytes_sent"].as_u64().unwrap() > 0 && network["bytes_received"].as_u64().unwrap() > 0);
    assert!(network["retries"].is_u64() && network["hedged"].is_u64());
    assert_eq!(here["network"]["frames"], 0);
}

#[test]
fn a_seed_gives_the_same_text_here_and_over_a_network() {
    let nodes = Node::halves();
    let address = nodes[0].address();
    let drawn = |seed: &str, place: &[&str]| {
        let args =
            ["--prompt", PROMPT, "--max-tokens", "40", "--temperature", "0.9", "--top-p", "0.95", "--seed", seed];
        document(with("generate", args.into_iter().chain(place.iter().copied())))["tokens"].clone()
    };
    let here = drawn("7", &["--local"]);
    assert_eq!(drawn("7", &["--bootstrap", &address]), here);
    assert_ne!(drawn("8", &["--local"]), here);
}

#[test]
fn text_streams_and_stops_before_a_stop_text() {
    let model = tiny_moe();
    let model = model.to_str().unwrap();
    let plain =
        ["generate", "--local", "--model", model, "--prompt", PROMPT, "--max-tokens", "48", "--temperature", "0"];
    let output = run(plain.into_iter().chain(["--ignore-eos"]));
    let expected = golden()["prompts"][0]["greedy_text"].as_str().unwrap().to_owned();
    assert_eq!(text(&output.stdout), expected.clone() + "\n");
    assert!(text(&output.stderr).contains("48 tokens"), "{}", text(&output.stderr));
    let stopped = document(plain.into_iter().chain(["--json", "--stop", "One day"]));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"], expected.split("One day").next().unwrap());
}

#[test]
fn scores_and_logits_are_the_references_here_and_over_a_network() {
    let nodes = Node::halves();
    let address = nodes[0].address();
    let prompt = &golden()["prompts"][0];
    let ids: Vec<String> = prompt["input_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let ids = ids.join(",");
    let golden = std::fs::read(tiny_moe().join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let expected = floats(golden.tensor("0.logits").unwrap().data());
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let std = (expected.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / expected.len() as f32).sqrt();
    let mut documents = Vec::new();
    for place in [&["--bootstrap", &address][..], &["--local"], &[]] {
        let dir = home();
        let file = dir.path().join("logits.safetensors");
        let args = ["--prompt-ids", &ids, "--logits-out", file.to_str().unwrap()];
        let score = document(with("score", args.into_iter().chain(place.iter().copied())));
        let bytes = std::fs::read(&file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let logits = tensors.tensor("logits").unwrap();
        assert_eq!((logits.dtype(), logits.shape()), (safetensors::Dtype::F32, &[13, 4096][..]));
        let found = floats(logits.data());
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / std;
        println!("{place:?}: logits {worst:.2e} std");
        assert!(worst <= 1e-4, "{worst}");
        assert_eq!(score["tokens"], prompt["input_ids"]);
        let logprobs = score["logprobs"].as_array().unwrap();
        assert_eq!((logprobs.len(), &logprobs[0]), (13, &Value::Null));
        let sum: f64 = logprobs[1..].iter().map(|value| value.as_f64().unwrap()).sum();
        assert!((score["perplexity"].as_f64().unwrap() - (-sum / 12.0).exp()).abs() < 1e-3);
        documents.push((score["logprobs"].clone(), found.iter().map(|v| v.to_bits()).collect::<Vec<_>>()));
    }
    assert!(documents.iter().all(|document| *document == documents[0]), "the same bits everywhere");
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_file_is_scored_as_its_text() {
    let page = root().join("tests/fixtures/page.txt");
    let file = document(with("score", ["--file", page.to_str().unwrap()]));
    let text = document(with("score", ["--prompt", &std::fs::read_to_string(&page).unwrap()]));
    assert_eq!(file, text);
    assert!(file["perplexity"].as_f64().unwrap() > 1.0);
}

#[test]
fn status_shows_what_is_missing_and_who_is_there() {
    let first = Node::start(&tiny_moe(), "0-5:0-7", None);
    let address = first.address();
    let status = || document(["status", "--json", "--bootstrap", &address]);
    // Its records reach the other members a moment after it is ready.
    waits_for("its experts are known", || status()["layers"][0]["missing"].as_array().unwrap().len() == 8);
    let half = status();
    assert_eq!(half["model_id"], first.ready["model_id"]);
    let layers = half["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for (number, layer) in layers.iter().enumerate() {
        let expected =
            json!({"layer": number, "experts": 16, "missing": [8, 9, 10, 11, 12, 13, 14, 15], "min_replicas": 0});
        assert_eq!(*layer, expected);
    }
    let _second = Node::start(&tiny_moe(), "0-5:4-15", Some(&address));
    waits_for("both peers are known", || status()["peers"].as_array().unwrap().len() == 2);
    let whole = status();
    for layer in whole["layers"].as_array().unwrap() {
        assert_eq!((&layer["missing"], &layer["min_replicas"]), (&json!([]), &json!(1)));
    }
    let peers = whole["peers"].as_array().unwrap();
    assert_eq!(peers.len(), 2);
    for peer in peers {
        assert!(peer["peer_id"].is_string() && peer["addresses"][0].is_string() && peer["load"].is_number(), "{peer}");
        assert!(peer["round_trip_ms"].as_f64().unwrap() > 0.0 && peer["reachability"] == "direct", "{peer}");
    }
    let experts: Vec<u64> = peers.iter().map(|peer| peer["experts"].as_u64().unwrap()).collect();
    assert_eq!(experts.iter().sum::<u64>(), 48 + 72);
    let table = run(["status", "--bootstrap", &address]);
    assert!(text(&table.stdout).contains("direct"));
    let output = run(["status", "--json", "--bootstrap", &address, "--model", tiny_moe().to_str().unwrap()]);
    assert_eq!(document_of(&output)["model_id"], first.ready["model_id"]);
}
