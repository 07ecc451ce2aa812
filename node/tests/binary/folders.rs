//! Commands that write model folders: import, carve, quantize; and slices over a network.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::{Node, document, home, root, run, text, tiny_moe};

fn gguf(name: &str) -> String {
    root().join(format!("tests/fixtures/gguf/{name}.gguf")).to_str().unwrap().to_owned()
}

/// A place for a new folder.
fn place(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

fn tokens(model: &str, more: &[&str]) -> Value {
    let args = [
        "generate",
        "--json",
        "--model",
        model,
        "--prompt-ids",
        "3,1,4,1,5",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ];
    document(args.iter().chain(more))["tokens"].clone()
}

#[test]
fn a_gguf_file_is_imported_carved_and_served_by_two_volunteers() {
    let folder = home();
    let (dense, carved) = (place(&folder, "dense"), place(&folder, "carved"));
    let imported = document(["import", &gguf("qwen2_blocks"), "--out", &dense, "--json"]);
    assert_eq!((&imported["family"], &imported["architecture"]), (&Value::from("qwen2"), &Value::from("qwen2")));
    assert_eq!(imported["types"]["Q8_0"], 4);
    let report = document(["carve", &dense, "--slices", "4", "--out", &carved, "--json"]);
    assert_eq!((&report["layers"], &report["slices"]), (&Value::from(3), &Value::from(4)));

    let expected = tokens(&dense, &["--local"]);
    assert_eq!(expected.as_array().unwrap().len(), 12);
    assert_eq!(tokens(&carved, &["--local"]), expected);
    let first = Node::start(Path::new(&carved), "0-2:0-1", None);
    let _second = Node::start(Path::new(&carved), "0-2:2-3", Some(&first.address()));
    assert_eq!(tokens(&carved, &["--bootstrap", &first.address()]), expected);
}

#[test]
fn experts_are_quantised_and_the_folder_is_a_model() {
    let folder = home();
    let out = place(&folder, "q8");
    let tiny = tiny_moe().display().to_string();
    document(["quantize", &tiny, "--to", "q8_0", "--out", &out, "--json"]);
    let [before, after] = [&tiny, &out].map(|dir| document(["inspect", "--json", "--model", dir]));
    assert_eq!(before["trunk_bytes"], after["trunk_bytes"]);
    let config = std::fs::read_to_string(Path::new(&out).join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let (manifest, keys) = (place(&folder, "manifest"), place(&folder, "keys"));
    let described = document(["manifest", &tiny, "--out", &manifest, "--data-dir", &keys, "--json"]);
    let original = &config["quantization_config"]["of"];
    assert_eq!(*original, described["model_id"], "so that clients of either find its volunteers");
    // 34 bytes for 32 values that had two each.
    assert_eq!(after["expert_bytes"].as_u64().unwrap() * 64, before["expert_bytes"].as_u64().unwrap() * 34);
    let expected = tokens(&out, &["--local"]);
    assert_eq!(expected.as_array().unwrap().len(), 12);

    let node = Node::start(Path::new(&out), "all", None);
    let join = ["--bootstrap", &node.address(), "--join-timeout", "4"];
    assert_eq!(tokens(&out, &join), expected);
    assert_eq!(tokens(&tiny, &[&join[..], &["--precision", "q8"]].concat()), expected);
    let refused = run([&["generate", "--model", &tiny, "--prompt", "a", "--json"], &join[..]].concat());
    assert!(text(&refused.stderr).contains("--precision any accepts"), "{}", text(&refused.stderr));
}

#[test]
fn what_is_there_is_not_written_over_and_what_is_no_gguf_file_is_refused() {
    let folder = home();
    let out = place(&folder, "there");
    std::fs::create_dir(&out).unwrap();
    for args in [
        vec!["import", &gguf("llama"), "--out", &out],
        vec!["import", tiny_moe().join("config.json").to_str().unwrap(), "--out", &place(&folder, "other")],
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.contains("exists") || said.contains("GGUF"), "{said}");
    }
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
}
