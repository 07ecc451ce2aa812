//! `hanse testnet`: orders are carried out, the network goes on, and nothing is left of it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::{document_of, hanse, home, run, signal, text, tiny_moe, waits_for};

/// A network in the foreground of a process; killed when dropped.
pub(crate) struct Up {
    child: Child,
    pub(crate) ready: Value,
    home: TempDir,
}

impl Up {
    pub(crate) fn start(args: &[&str]) -> Self {
        let home = home();
        let mut command = hanse(&home);
        command.args(["testnet", "up", "--json", "--state"]).arg(home.path().join("state")).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|error| panic!("ready line {line:?}: {error}"));
        Self { child, ready, home }
    }

    fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    fn order(&self, args: &[&str]) {
        let output = hanse(&self.home).arg("testnet").args(args).arg("--state").arg(self.state()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }

    fn status(&self) -> Value {
        let mut command = hanse(&self.home);
        command.args(["testnet", "status", "--json", "--state"]).arg(self.state());
        document_of(&command.output().unwrap())
    }

    pub(crate) fn states(&self) -> Vec<String> {
        let status = self.status();
        status["nodes"].as_array().unwrap().iter().map(|node| node["state"].as_str().unwrap().to_owned()).collect()
    }

    fn pids(&self) -> Vec<u32> {
        let status = self.status();
        status["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|node| node["pid"].as_u64())
            .map(|pid| pid as u32)
            .collect()
    }

    fn tokens(&self) -> Value {
        tokens(&["--bootstrap", self.status()["bootstrap"].as_str().unwrap()])
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It may have been ended by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tokens(place: &[&str]) -> Value {
    let model = tiny_moe();
    let args =
        ["generate", "--model", model.to_str().unwrap(), "--prompt-ids", "1,2,3", "--max-tokens", "16", "--json"];
    document_of(&run(args.iter().chain(place)))["tokens"].clone()
}

#[cfg(target_os = "linux")]
fn runs(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_network_is_broken_and_healed_by_orders_and_generates_the_same_tokens_throughout() {
    let mut up = Up::start(&["--nodes", "4", "--rtt", "4ms", "--jitter", "2ms", "--loss", "1%"]);
    assert_eq!(up.ready["nodes"].as_array().unwrap().len(), 4);
    assert!(up.ready["bootstrap"].as_str().unwrap().contains("/p2p/"));
    assert_eq!(up.ready["nodes"][0]["to"]["delay"], 2.0);
    let expected = tokens(&["--local"]);
    assert_eq!(up.tokens(), expected);
    assert!(up.status()["nodes"].as_array().unwrap().iter().any(|node| node["to"]["packets"]["passed"] != 0));

    up.order(&["kill", "0"]);
    up.order(&["slow", "2", "--times", "4"]);
    assert_eq!(up.states(), ["killed", "running", "slowed", "running"]);
    assert_eq!(up.tokens(), expected, "through another volunteer");
    up.order(&["restart", "0"]);
    up.order(&["resume", "2"]);
    up.order(&["pause", "1"]);
    assert_eq!(up.states(), ["running", "paused", "running", "running"]);
    assert_eq!(up.status()["nodes"][0]["peer_id"], up.ready["nodes"][0]["peer_id"], "the same identity");
    up.order(&["cut", "3", "--to"]);
    let cut = up.status();
    assert_eq!(
        (&cut["nodes"][3]["to"]["cut"], &cut["nodes"][3]["from"]["cut"]),
        (&Value::from(true), &Value::from(false))
    );
    up.order(&["heal"]);
    assert_eq!(up.states(), ["running"; 4]);
    assert_eq!(up.status()["nodes"][3]["to"]["cut"], false);
    assert_eq!(up.tokens(), expected);

    up.order(&["down"]);
    waits_for("the network ends", || up.child.try_wait().unwrap().is_some());
    assert_eq!(up.child.wait().unwrap().code(), Some(0));
    assert!(!up.state().exists(), "the socket is removed");
}

#[test]
fn orders_that_make_no_sense_say_why() {
    let up = Up::start(&["--nodes", "2", "--replicas", "1"]);
    for (args, expected) in [(["kill", "7"], "there is no volunteer 7"), (["up", "--json"], "runs in")] {
        let output = hanse(&up.home).arg("testnet").args(args).arg("--state").arg(up.state()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    let nowhere = up.home.path().join("nowhere");
    let output = run(["testnet", "status", "--state", nowhere.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no testnet runs in"), "{}", text(&output.stderr));
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_network_that_is_killed_also_not_a_paused_volunteer() {
    let mut up = Up::start(&["--nodes", "3"]);
    up.order(&["pause", "1"]);
    let pids = up.pids();
    assert_eq!(pids.len(), 3);
    signal(up.child.id(), "KILL");
    up.child.wait().unwrap();
    waits_for("the volunteers are gone", || !pids.iter().any(|&pid| runs(pid)));
}

#[cfg(target_os = "linux")]
#[test]
fn a_network_that_kills_its_volunteers_brings_them_back() {
    let up = Up::start(&["--nodes", "3", "--kill-every", "2s"]);
    waits_for("one is killed", || up.states().iter().any(|state| state == "killed"));
    waits_for("all are back", || up.states().iter().all(|state| state == "running"));
    let pids = up.pids();
    signal(up.child.id(), "TERM");
    waits_for("the volunteers are gone", || !pids.iter().any(|&pid| runs(pid)));
}
