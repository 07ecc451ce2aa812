//! The gateway and the `openai` Python package, with processes: a volunteer, a gateway, Python.
//!
//! Needs a Python that has the package (`HANSE_PYTHON`, by default `python3`); skipped with the reason without one, unless
//! `HANSE_OPENAI_TESTS=require`.

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

#[test]
fn the_openai_package_finds_what_it_expects() {
    let python = std::env::var("HANSE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&python).args(["-c", "import openai"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        let required = std::env::var("HANSE_OPENAI_TESTS").is_ok_and(|value| value == "require");
        assert!(!required, "{python} has no package openai");
        println!("skipped: {python} has no package openai");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let model = tiny_moe();
    let model = model.to_str().unwrap();
    let listen = "/ip4/127.0.0.1/udp/0/quic-v1";
    let (_node, ready) =
        start(hanse(home.path()).args(["node", "--json", "--model", model, "--experts", "all"]).args([
            "--listen",
            listen,
            "--data-dir",
            home.path().join("node").to_str().unwrap(),
        ]));
    let bootstrap = ready["addresses"][0].as_str().unwrap();
    let texts = ["Once upon a time, there was a little fox.", "The owl and the fox were friends, and the lamb too."];
    let scores = texts.map(|text| {
        let output =
            hanse(home.path()).args(["score", "--json", "--model", model, "--local", "--prompt", text]).output();
        (text.to_owned(), serde_json::from_slice::<Value>(&output.unwrap().stdout).unwrap())
    });
    let file = home.path().join("scores.json");
    std::fs::write(&file, json!(serde_json::Map::from_iter(scores)).to_string()).unwrap();
    let gateway = ["gateway", "--json", "--model", model, "--bootstrap", bootstrap, "--listen", "127.0.0.1:0"];
    let (_gateway, ready) = start(hanse(home.path()).args(gateway));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai/check.py");
    let url = format!("{}/v1", ready["url"].as_str().unwrap());
    let output = Command::new(&python).arg(script).args([&url, "tiny-moe"]).arg(&file).output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}
