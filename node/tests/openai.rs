//! The gateway and the Python packages `openai` and `lm-eval`, with processes: a volunteer, a gateway, Python.
//!
//! Needs a Python that has the packages (`HANSE_PYTHON`, by default `python3`): `openai`; `lm-eval[api]` and `transformers`. Skipped
//! with the reason without them, unless `HANSE_OPENAI_TESTS=require` or `HANSE_LM_EVAL_TESTS=require`.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/models/tiny-moe")
}

/// A process that is killed at the end.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hanse(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.env("XDG_CACHE_HOME", home).env("XDG_DATA_HOME", home);
    command
}

/// Starts a command that says in one JSON document when it is ready.
fn start(command: &mut Command) -> (Process, Value) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let process = Process(child);
    let mut text = String::new();
    loop {
        assert!(output.read_line(&mut text).unwrap() > 0, "it ended: {text}");
        if let Ok(ready) = serde_json::from_str(&text) {
            return (process, ready);
        }
    }
}

/// A Python that has `package`; otherwise says why the test is skipped, and fails if the variable `required_by` is `require`.
fn python_with(package: &str, required_by: &str) -> Option<String> {
    let python = std::env::var("HANSE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&python).args(["-c", &format!("import {package}")]).output();
    if probe.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let required = std::env::var(required_by).is_ok_and(|value| value == "require");
    assert!(!required, "{python} has no package {package}");
    println!("skipped: {python} has no package {package}");
    None
}

/// What `hanse score` says of `text`.
fn score(home: &Path, text: &str) -> Value {
    let output = hanse(home).args(["score", "--json", "--local", "--prompt", text, "--model"]).arg(tiny_moe()).output();
    serde_json::from_slice(&output.unwrap().stdout).unwrap()
}

/// A volunteer with everything, and a gateway that uses it.
struct Network {
    _node: Process,
    _gateway: Process,
    url: String,
}

impl Network {
    fn start(home: &Path) -> Self {
        let model = tiny_moe();
        let mut node = hanse(home);
        node.args(["node", "--json", "--experts", "all", "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--model"]);
        let (node, ready) = start(node.arg(&model).arg("--data-dir").arg(home.join("node")));
        let bootstrap = ready["addresses"][0].as_str().unwrap();
        let mut gateway = hanse(home);
        gateway.args(["gateway", "--json", "--listen", "127.0.0.1:0", "--bootstrap", bootstrap, "--model"]);
        let (gateway, ready) = start(gateway.arg(&model));
        let url = format!("{}/v1", ready["url"].as_str().unwrap());
        Self { _node: node, _gateway: gateway, url }
    }
}

/// Runs a script beside this file; it must end well.
fn run(python: &str, script: &str, args: &[&OsStr]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai").join(script);
    let output = Command::new(python).arg(script).args(args).env("HF_HUB_OFFLINE", "1").output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}

#[test]
fn the_openai_package_finds_what_it_expects() {
    let Some(python) = python_with("openai", "HANSE_OPENAI_TESTS") else { return };
    let home = tempfile::tempdir().unwrap();
    let texts = ["Once upon a time, there was a little fox.", "The owl and the fox were friends, and the lamb too."];
    let scores = texts.map(|text| (text.to_owned(), score(home.path(), text)));
    let file = home.path().join("scores.json");
    std::fs::write(&file, json!(serde_json::Map::from_iter(scores)).to_string()).unwrap();
    let network = Network::start(home.path());
    run(&python, "check.py", &[network.url.as_ref(), "tiny-moe".as_ref(), file.as_ref()]);
}

#[test]
fn the_evaluation_harness_scores_as_score_does() {
    let Some(python) = python_with("lm_eval, transformers", "HANSE_LM_EVAL_TESTS") else { return };
    let home = tempfile::tempdir().unwrap();
    let cases = [
        ("Once upon a time, there was a little", [" girl named Lily.", " quantum flux."], 0),
        ("Tom was very happy. He", [" xylophone the", " smiled and ran to the park."], 1),
        ("The dog wanted to play with the", [" ball.", " said is"], 0),
    ];
    let cases = cases.map(|(context, choices, gold)| {
        let scores = choices.map(|choice| score(home.path(), &format!("{context}{choice}")));
        json!({ "context": context, "choices": choices, "gold": gold, "scores": scores })
    });
    let file = home.path().join("cases.json");
    std::fs::write(&file, json!(cases).to_string()).unwrap();
    let network = Network::start(home.path());
    run(&python, "harness.py", &[network.url.as_ref(), "tiny-moe".as_ref(), tiny_moe().as_ref(), file.as_ref()]);
}
