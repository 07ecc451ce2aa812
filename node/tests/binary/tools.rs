//! What looks after the program and the machine: help, completions, manual pages, the doctor, and watching a network.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::{LOOPBACK, Node, hanse, home, run, signal, text, tiny_moe, waits_for};

const COMMANDS: &[&str] = &[
    "demo",
    "node",
    "pause",
    "resume",
    "generate",
    "chat",
    "gateway",
    "score",
    "status",
    "doctor",
    "inspect",
    "manifest",
    "quantize",
    "carve",
    "import",
    "bench",
    "completions",
    "man",
];

#[cfg(unix)]
const TESTNET: &[&str] =
    &["up", "status", "kill", "pause", "resume", "restart", "slow", "cut", "heal", "down", "chaos"];

/// What a command that succeeds prints.
fn printed<const N: usize>(args: [&str; N]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What `--help` says of a command on a terminal that is so wide.
fn help(command: &[&str], columns: &str) -> String {
    let output = hanse(&home()).args(command).arg("--help").env("COLUMNS", columns).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn help_is_as_wide_as_the_terminal_and_ends_with_examples() {
    let commands = COMMANDS.iter().map(|&command| vec![command]);
    #[cfg(unix)]
    let commands = commands.chain([vec!["testnet"]]).chain(TESTNET.iter().map(|&order| vec!["testnet", order]));
    for command in commands {
        let narrow = help(&command, "80");
        for line in narrow.lines() {
            // The options that must be given are told in one line.
            assert!(line.chars().count() <= 80 || line.starts_with("Usage:"), "{command:?}: {line:?}");
        }
        assert!(narrow.contains("\nExamples:\n"), "{command:?}: {narrow}");
    }
    let widest = |columns| help(&["node"], columns).lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest("50") < widest("80") && (81..=100).contains(&widest("200")), "the terminal decides up to 100");
    assert!(help(&[], "80").contains("hanse demo"));
}

#[cfg(unix)]
#[test]
fn completions_are_what_the_shell_understands() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = printed(["completions", shell]);
        assert!(script.contains("doctor") && script.contains("bootstrap"), "{shell}");
    }
    let file = home();
    let path = file.path().join("hanse");
    std::fs::write(&path, printed(["completions", "bash"])).unwrap();
    let asks = format!(
        "set -e; source {}; COMP_WORDS=(hanse do); COMP_CWORD=1; _hanse hanse do hanse; echo ${{COMPREPLY[@]}}",
        path.display()
    );
    let answer = Command::new("bash").args(["-c", &asks]).output().unwrap();
    assert_eq!(text(&answer.stdout).trim(), "doctor", "{}", text(&answer.stderr));
    let output = run(["completions", "nosuch"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("bash"), "the known ones are named");
}

#[test]
fn there_is_a_manual_page_for_each_command() {
    let page = printed(["man"]);
    assert!(page.contains(".TH hanse 1") && page.contains("testnet"), "{page}");
    let dir = home();
    let pages = dir.path().join("man1");
    printed(["man", pages.to_str().unwrap()]);
    let commands = COMMANDS.iter().map(|command| (*command).to_owned());
    #[cfg(unix)]
    let commands = commands.chain(TESTNET.iter().map(|order| format!("testnet-{order}")));
    for command in commands {
        let page = std::fs::read_to_string(pages.join(format!("hanse-{command}.1"))).unwrap();
        assert!(page.contains("Examples:"), "{command}");
    }
    assert!(pages.join("hanse.1").exists());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = run(["man", file.join("below").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write manual pages"), "{}", text(&output.stderr));
}

/// What the doctor says: its exit status, and each check with its outcome.
fn doctor(args: &[&str]) -> (Option<i32>, Vec<(String, String, Value)>) {
    let Output { status, stdout, stderr } = run(["doctor", "--json", "--no-upnp"].iter().chain(args));
    let document: Value = serde_json::from_str(&text(&stdout)).unwrap_or_else(|_| panic!("{}", text(&stderr)));
    let of = |check: &Value, field: &str| check[field].as_str().unwrap().to_owned();
    let checks = document["checks"].as_array().unwrap();
    let found: Vec<_> = checks.iter().map(|c| (of(c, "check"), of(c, "outcome"), c.clone())).collect();
    for (_, outcome, check) in &found {
        assert_eq!(check["advice"].is_null(), outcome == "ok", "what to do is said where it is needed: {check}");
    }
    assert_eq!(document["ok"], !found.iter().any(|(_, outcome, _)| outcome == "fail"));
    assert_eq!(document["ok"], status.success(), "{}", text(&stderr));
    (status.code(), found)
}

fn outcome<'a>(checks: &'a [(String, String, Value)], check: &str) -> &'a str {
    &checks.iter().find(|(name, ..)| name == check).unwrap_or_else(|| panic!("{check} in {checks:?}")).1
}

#[test]
fn the_doctor_finds_a_machine_well_that_can_take_part() {
    let node = Node::start(&tiny_moe(), "all", None);
    let model = tiny_moe();
    let data = home();
    let args = ["--bootstrap", &node.address(), "--listen", LOOPBACK, "--model", model.to_str().unwrap()];
    let (status, checks) = doctor(&[&args[..], &["--data-dir", data.path().to_str().unwrap()]].concat());
    assert_eq!(status, Some(0), "{checks:?}");
    for check in ["key", "gpu", "port", "bootstrap", "nat", "clock", "model"] {
        assert_eq!(outcome(&checks, check), "ok", "{checks:?}");
    }
    assert_ne!(outcome(&checks, "disk"), "fail");
    assert!(std::fs::read_dir(data.path()).unwrap().next().is_none(), "looking leaves nothing behind");
    let lines = printed(["doctor", "--no-upnp", "--listen", LOOPBACK]);
    assert!(lines.lines().any(|line| line.starts_with("ok    key ")), "{lines}");
    assert!(lines.contains("-> give --bootstrap"), "{lines}");
}

#[cfg(unix)]
#[test]
fn the_doctor_says_what_is_wrong_and_fails() {
    use std::os::unix::fs::PermissionsExt;

    let data = home();
    let key = data.path().join("identity.key");
    std::fs::write(&key, [0; 68]).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    // A port that another has, and an address at which nobody is.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
    let data_dir = data.path().to_str().unwrap();
    let missing = data.path().join("nowhere");
    let args = [
        ["--data-dir", data_dir],
        ["--listen", &listen],
        ["--bootstrap", "/ip4/127.0.0.1/udp/9/quic-v1"],
        ["--memory", "1024PiB"],
    ];
    let (status, checks) = doctor(args.as_flattened());
    assert_eq!(status, Some(1));
    for check in ["key", "port", "bootstrap", "disk"] {
        assert_eq!(outcome(&checks, check), "fail", "{checks:?}");
    }
    let (status, checks) = doctor(&["--listen", LOOPBACK, "--model", missing.to_str().unwrap()]);
    assert_eq!((status, outcome(&checks, "model")), (Some(1), "fail"));
}

#[test]
fn the_doctor_looks_at_the_disk_of_a_folder_that_is_named_from_here() {
    let here = home();
    std::fs::write(here.path().join("file"), "").unwrap();
    // The check of the disk, and that of the key, with both folders there.
    let asks = |dir: &str| {
        let mut command = hanse(&here);
        command.current_dir(&here).args(["doctor", "--json", "--no-upnp", "--listen", LOOPBACK]);
        let output = command.args(["--cache-dir", dir, "--data-dir", dir]).output().unwrap();
        let document: Value = serde_json::from_str(&text(&output.stdout)).unwrap();
        ["disk", "key"].map(|name| {
            let check = document["checks"].as_array().unwrap().iter().find(|check| check["check"] == name).unwrap();
            (check["outcome"] == "fail", check["found"].as_str().unwrap().to_owned(), check["advice"].to_string())
        })
    };
    let place = here.path().canonicalize().unwrap();
    for dir in ["not/there/yet", "."] {
        let [(failed, found, _), _] = asks(dir);
        assert!(!failed && found.starts_with(&format!("{}", place.display())), "{dir}: {found}");
    }
    for dir in ["file/below", "file"] {
        for (check, option) in asks(dir).into_iter().zip(["--cache-dir", "--data-dir"]) {
            let (failed, found, advice) = check;
            assert!(
                failed && found.contains("file is no folder") && advice.contains(option),
                "{dir}: {found} {advice}"
            );
        }
    }
}

#[test]
fn a_bootstrap_address_that_is_dead_is_a_warning_beside_one_that_lives() {
    let node = Node::start(&tiny_moe(), "0:0", None);
    let (status, checks) =
        doctor(&["--listen", LOOPBACK, "--bootstrap", &node.address(), "/ip4/127.0.0.1/udp/9/quic-v1"]);
    let outcomes: Vec<&str> =
        checks.iter().filter(|(name, ..)| name == "bootstrap").map(|(_, outcome, _)| outcome.as_str()).collect();
    assert_eq!((status, outcomes), (Some(0), vec!["ok", "warn"]));
}

#[cfg(unix)]
#[test]
fn a_watched_network_is_shown_as_it_changes_until_interrupted() {
    let first = Node::start(&tiny_moe(), "0-5:0-7", None);
    let home = home();
    let mut command = hanse(&home);
    command.args(["status", "--watch", "1", "--json", "--bootstrap", &first.address()]);
    let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut until = |peers: usize| {
        // Lines come as long as the program runs.
        let shows = |line: std::io::Result<String>| {
            let document: Value = serde_json::from_str(&line.unwrap()).unwrap();
            document["peers"].as_array().unwrap().len() == peers
        };
        assert!(lines.by_ref().take(60).any(shows), "{peers} peers");
    };
    until(1);
    let _second = Node::start(&tiny_moe(), "0-5:8-15", Some(&first.address()));
    until(2);
    signal(watching.id(), "INT");
    waits_for("it ends", || watching.try_wait().unwrap().is_some());
    assert!(watching.wait().unwrap().success());
}

#[test]
fn the_report_for_people_joins_layers_that_are_alike() {
    let node = Node::start(&tiny_moe(), "0-3:0-15,4-5:0-7", None);
    let report = printed(["status", "--bootstrap", &node.address()]);
    let rows: Vec<&str> = report.lines().map(str::trim).collect();
    assert!(rows.iter().any(|row| row.starts_with("0-3 ")), "{report}");
    assert!(rows.iter().any(|row| row.starts_with("4-5 ") && row.ends_with("8-15")), "{report}");
    assert!(report.contains("16 experts have no host"), "{report}");
    assert!(report.lines().all(|line| line.chars().count() <= 80), "{report}");
}
