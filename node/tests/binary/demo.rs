//! The demo: what it shows, and that nothing is left of it.

use std::path::Path;

use serde_json::Value;

use crate::{document_of, hanse, home};
#[cfg(target_os = "linux")]
use crate::{signal, waits_for};

fn demo(args: &[&str]) -> Value {
    let home = home();
    let output = hanse(&home).args(["demo", "--json", "--max-tokens", "48"]).args(args).output().unwrap();
    let document = document_of(&output);
    assert!(processes_of(home.path()).is_empty(), "nothing is left running");
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "hanse"), "nothing but the cache is left: {left:?}");
    document
}

fn check(document: &Value) {
    assert_eq!(document["identical"], true);
    assert_eq!(document["tokens"], document["local_tokens"]);
    assert_eq!(document["tokens"].as_array().unwrap().len(), 48);
    assert!(document["prompt"].is_string() && !document["text"].as_str().unwrap().is_empty());
    assert!(document["tokens_per_second"].as_f64().unwrap() > 0.0);
    let peers = document["peers"].as_array().unwrap();
    assert_eq!(peers.len(), 4);
    for peer in peers {
        assert!(peer["peer_id"].is_string());
        assert_eq!(peer["experts"], 48, "each has half of the 96 experts, so each expert has two replicas");
        assert!(peer["calls"].is_u64() && peer["rows"].is_u64());
        assert!(peer["mean_ms"].is_number() && peer["p99_ms"].is_number());
    }
    let ids: std::collections::BTreeSet<_> = peers.iter().map(|peer| peer["peer_id"].to_string()).collect();
    assert_eq!(ids.len(), 4, "four identities");
    assert!(peers.iter().map(|peer| peer["calls"].as_u64().unwrap()).sum::<u64>() >= 48 * 6);
}

#[test]
fn the_demo_gives_the_tokens_of_one_process() {
    let document = demo(&[]);
    check(&document);
    assert_eq!(document["killed"], Value::Null);
    assert!(document["peers"].as_array().unwrap().iter().all(|peer| peer["alive"] == true));
}

#[test]
fn the_demo_gives_the_same_tokens_when_a_volunteer_is_killed() {
    let document = demo(&["--kill"]);
    check(&document);
    let killed = &document["killed"];
    assert!(killed.is_string());
    for peer in document["peers"].as_array().unwrap() {
        assert_eq!(peer["alive"], peer["peer_id"] != *killed, "{peer}");
    }
}

/// The processes whose command line names something in `dir`: the demo's volunteers, whose data is there.
#[cfg(target_os = "linux")]
fn processes_of(dir: &Path) -> Vec<u32> {
    let names_dir = |pid: &u32| {
        // A process that has just ended has no command line any more.
        let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command_line).contains(dir.to_str().unwrap())
    };
    let entries = std::fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter(names_dir).collect()
}

#[cfg(not(target_os = "linux"))]
fn processes_of(_: &Path) -> Vec<u32> {
    Vec::new()
}

/// Ends a demo by `name` once `volunteers` of its volunteers run, and waits until they are gone.
#[cfg(target_os = "linux")]
fn end_demo(name: &str, volunteers: usize) {
    let home = home();
    let mut command = hanse(&home);
    command.args(["demo", "--max-tokens", "480"]);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    waits_for("the volunteers run", || processes_of(home.path()).len() >= volunteers);
    signal(child.id(), name);
    waits_for("the demo ends", || child.try_wait().unwrap().is_some());
    let code = child.wait().unwrap().code();
    assert_eq!(code, if name == "KILL" { None } else { Some(1) }, "SIG{name}");
    waits_for("the volunteers are gone", || processes_of(home.path()).is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_demo_that_is_interrupted() {
    end_demo("INT", 1);
    end_demo("INT", 4);
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_demo_that_is_terminated() {
    end_demo("TERM", 1);
    end_demo("TERM", 4);
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_demo_that_is_killed() {
    end_demo("KILL", 1);
    end_demo("KILL", 4);
}
