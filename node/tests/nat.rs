//! Volunteers behind home routers, with real address translation: network namespaces and iptables masquerading.
//!
//! ```text
//!                          203.0.113.0/24
//!   bootstrap .10 ──┬── client .20 ──┬── router A .101 ──┬── router B .102
//!                                    │                   │
//!                              10.1.1.0/24         10.1.2.0/24
//!                             volunteer A .2       volunteer B .2
//! ```
//!
//! Needs root, `ip` and `iptables`; skipped with the reason where it may not make namespaces, unless `HANSE_NAT_TESTS=require`.

#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// What is waited for comes within this, or the test fails.
const PATIENCE: Duration = Duration::from_secs(60);
const PROMPT: &str = "The harbour of Lübeck";
const TOKENS: &str = "48";
/// So many take a while.
const MANY_TOKENS: &str = "400";

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/models/tiny-moe")
}

/// How a router chooses the outer port of a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Nat {
    /// The inner port if it is free, as most home routers do: holes can be punched.
    KeepsPorts,
    /// Another one for every destination: they cannot.
    Symmetric,
}

/// The world of one test; its namespaces vanish with it.
struct World {
    prefix: String,
    spaces: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        for space in &self.spaces {
            // What cannot be removed was not made.
            let _ = Command::new("ip").args(["netns", "del", space]).output();
        }
    }
}

/// Runs a program to its end; its output if it fails.
fn tool(line: &str) -> Result<(), String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .map_err(|error| format!("{line}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl World {
    /// `None` where namespaces may not be made, after saying why.
    fn new(nat: Nat) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("hanse-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut world = Self { prefix, spaces: Vec::new() };
        match world.build(nat) {
            Ok(()) => Some(world),
            Err(reason) if std::env::var("HANSE_NAT_TESTS").is_ok_and(|value| value == "require") => {
                panic!("cannot make namespaces: {reason}")
            }
            Err(reason) => {
                eprintln!("skipped: cannot make namespaces: {reason}");
                None
            }
        }
    }

    fn name(&self, space: &str) -> String {
        format!("{}-{space}", self.prefix)
    }

    fn add(&mut self, space: &str) -> Result<(), String> {
        let name = self.name(space);
        tool(&format!("ip netns add {name}"))?;
        self.spaces.push(name);
        self.inside(space, "ip link set lo up")
    }

    fn inside(&self, space: &str, line: &str) -> Result<(), String> {
        tool(&format!("ip netns exec {} {line}", self.name(space)))
    }

    /// A cable from `space` (its end named `end`, with an address) to `other`.
    fn cable(&self, space: &str, end: &str, address: &str, other: &str, other_end: &str) -> Result<(), String> {
        let (space_name, other_name) = (self.name(space), self.name(other));
        tool(&format!("ip link add {end} netns {space_name} type veth peer name {other_end} netns {other_name}"))?;
        self.inside(space, &format!("ip address add {address} dev {end}"))?;
        self.inside(space, &format!("ip link set {end} up"))?;
        self.inside(other, &format!("ip link set {other_end} up"))
    }

    fn build(&mut self, nat: Nat) -> Result<(), String> {
        self.add("world")?;
        self.inside("world", "ip link add street type bridge")?;
        self.inside("world", "ip link set street up")?;
        for (space, address) in [("boot", "203.0.113.10/24"), ("client", "203.0.113.20/24")] {
            self.add(space)?;
            self.on_street(space, address)?;
        }
        for (router, home, number) in [("router-a", "home-a", 1), ("router-b", "home-b", 2)] {
            self.add(router)?;
            self.add(home)?;
            self.on_street(router, &format!("203.0.113.{}/24", 100 + number))?;
            self.cable(router, "lan", &format!("10.1.{number}.1/24"), home, "eth0")?;
            self.inside(home, &format!("ip address add 10.1.{number}.2/24 dev eth0"))?;
            self.inside(home, &format!("ip route add default via 10.1.{number}.1"))?;
            self.inside(router, "sysctl -q -w net.ipv4.ip_forward=1")?;
            let ports = if nat == Nat::Symmetric { "--random" } else { "" };
            self.inside(router, &format!("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE {ports}"))?;
            // As routers do: what nobody inside asked for is dropped without an answer.
            self.inside(router, "iptables -A INPUT -i eth0 -j DROP")?;
        }
        Ok(())
    }

    fn on_street(&self, space: &str, address: &str) -> Result<(), String> {
        self.cable(space, "eth0", address, "world", space)?;
        self.inside("world", &format!("ip link set {space} master street"))
    }

    fn hanse(&self, space: &str, home: &TempDir) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(space), env!("CARGO_BIN_EXE_hanse")]);
        for name in ["HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"] {
            command.env(name, home.path());
        }
        command.env("HANSE_LOG", "hanse_router=debug,hanse_protocol=debug").env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::null());
        command
    }

    fn node(&self, space: &str, args: &[&str]) -> Node {
        let home = tempfile::tempdir().unwrap();
        let log = home.path().join("log");
        let mut command = self.hanse(space, &home);
        command.args(["node", "--json", "--threads", "1", "--model"]).arg(tiny_moe()).args(args);
        let errors = std::fs::File::create(&log).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("ready line {line:?}: {error}: {}", std::fs::read_to_string(&log).unwrap()));
        Node { child, ready, log, _home: home }
    }

    fn bootstrap(&self) -> Node {
        let listen = ["--listen", "/ip4/203.0.113.10/udp/4001/quic-v1", "/ip4/203.0.113.10/tcp/4001"];
        self.node("boot", &[&["--experts", "none"], &listen[..]].concat())
    }

    /// Runs the client to its end.
    fn client(&self, args: &[&str]) -> Output {
        self.hanse("client", &tempfile::tempdir().unwrap()).args(args).output().unwrap()
    }

    fn generate(&self, bootstrap: &str) -> Generated {
        self.generation("client", bootstrap, TOKENS).end()
    }

    fn generation(&self, space: &str, bootstrap: &str, tokens: &str) -> Generation {
        let home = tempfile::tempdir().unwrap();
        let (document, log) = (home.path().join("document"), home.path().join("log"));
        let mut command = self.hanse(space, &home);
        command.args(["generate", "--json", "--threads", "1", "--prompt", PROMPT, "--max-tokens", tokens, "--model"]);
        command.arg(tiny_moe()).args(["--join-timeout", "60", "--bootstrap", bootstrap]);
        let file = |path| std::fs::File::create(path).unwrap();
        let child = command.stdout(file(&document)).stderr(file(&log)).spawn().unwrap();
        Generation { child, document, log, _home: home }
    }

    /// The reachability that `hanse status` shows of `peer`.
    fn reachability(&self, bootstrap: &str, peer: &str) -> String {
        let output = self.client(&["status", "--json", "--bootstrap", bootstrap]);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let peers = document["peers"].as_array().cloned().unwrap_or_default();
        let row = peers.iter().find(|row| row["peer_id"] == *peer);
        row.and_then(|row| row["reachability"].as_str()).unwrap_or_default().to_owned()
    }
}

/// A volunteer process; killed when dropped.
struct Node {
    child: Child,
    ready: Value,
    log: PathBuf,
    _home: TempDir,
}

impl Node {
    fn addresses(&self) -> Vec<String> {
        let addresses = self.ready["addresses"].as_array().unwrap();
        addresses.iter().map(|address| address.as_str().unwrap().to_owned()).collect()
    }

    fn address(&self) -> String {
        self.addresses().remove(0)
    }

    fn peer_id(&self) -> &str {
        self.ready["peer_id"].as_str().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of {}:\n{}", self.ready, self.log());
        }
        // It may have been ended by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that generates; killed when dropped.
struct Generation {
    child: Child,
    document: PathBuf,
    log: PathBuf,
    _home: TempDir,
}

impl Generation {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn end(mut self) -> Generated {
        let status = self.child.wait().unwrap();
        let stdout = std::fs::read(&self.document).unwrap();
        Generated::of(&Output { status, stdout, stderr: self.log().into_bytes() })
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls until `condition` holds.
fn waits_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Generated {
    tokens: Value,
    network: Value,
    log: String,
}

impl Generated {
    fn of(output: &Output) -> Self {
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        Self { tokens: document["tokens"].clone(), network: document["network"].clone(), log }
    }
}

/// The tokens of one process that holds the whole model.
fn local_tokens(tokens: &str) -> Value {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.env("HOME", home.path()).env("XDG_CACHE_HOME", home.path()).env("XDG_DATA_HOME", home.path());
    command.args(["generate", "--json", "--local", "--threads", "1", "--prompt", PROMPT, "--max-tokens", tokens]);
    command.arg("--model").arg(tiny_moe());
    Generated::of(&command.output().unwrap()).tokens
}

/// Two volunteers behind two routers, each with half of the experts.
fn halves(world: &World, bootstrap: &str) -> [Node; 2] {
    [("home-a", "0-5:0-7"), ("home-b", "0-5:8-15")]
        .map(|(home, experts)| world.node(home, &["--experts", experts, "--bootstrap", bootstrap]))
}

#[test]
fn volunteers_behind_routers_serve_exactly_and_holes_are_punched() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let volunteers = halves(&world, &boot.address());
    // The first frames may go through the relay; those that follow see the holes punched.
    let mut generation = world.generation("client", &boot.address(), MANY_TOKENS);
    waits_for("both are reached directly", || {
        let log = generation.log();
        assert!(generation.is_running(), "it ended before holes were punched:\n{log}");
        let better = |volunteer: &Node, line: &str| line.contains("better way") && line.contains(volunteer.peer_id());
        volunteers.iter().all(|volunteer| log.lines().any(|line| better(volunteer, line)))
    });
    let generated = generation.end();
    assert_eq!(generated.tokens, local_tokens(MANY_TOKENS));
    assert_eq!(generated.network["peers"], 2, "{}", generated.network);
    assert!(generated.log.contains("hole punched"), "{}", generated.log);
}

#[test]
fn a_relay_carries_the_frames_where_no_hole_can_be_punched() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    let volunteers = halves(&world, &boot.address());
    let generated = world.generate(&boot.address());
    assert_eq!(generated.tokens, local_tokens(TOKENS));
    assert_eq!(generated.network["peers"], 2, "{}", generated.network);
    assert!(!generated.log.contains("hole punched") && !generated.log.contains("better way"), "{}", generated.log);
    for volunteer in &volunteers {
        assert_eq!(world.reachability(&boot.address(), volunteer.peer_id()), "relayed");
        assert!(!volunteer.log().contains("direct=true"), "no router lets AutoNAT in: {}", volunteer.log());
    }
}

#[test]
fn a_volunteer_behind_a_router_may_die_while_another_has_its_experts() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    // One that has everything is asked rather than two that have half each.
    let volunteers = [("home-a", "all"), ("home-b", "0-5:0-7"), ("home-b", "0-5:8-15")];
    let mut volunteers =
        volunteers.map(|(home, experts)| world.node(home, &["--experts", experts, "--bootstrap", &boot.address()]));
    let mut generation = world.generation("client", &boot.address(), MANY_TOKENS);
    waits_for("all are found", || generation.log().matches("peer found").count() == 3);
    std::thread::sleep(Duration::from_millis(700));
    assert!(generation.is_running(), "the volunteer is to die in the middle");
    volunteers[0].child.kill().unwrap();
    let expected = local_tokens(MANY_TOKENS);
    let disturbed = generation.end();
    assert_eq!(disturbed.tokens, expected);
    let network = &disturbed.network;
    let asked_again = ["retries", "hedged"].iter().filter_map(|count| network[count].as_u64()).sum::<u64>();
    assert!(asked_again > 0 && network["peers"] == 3, "it was in use when it died: {network}");
    // Its records outlive it: who comes later finds them, and does without it.
    assert_eq!(world.generation("client", &boot.address(), MANY_TOKENS).end().tokens, expected);
}

#[test]
fn a_volunteer_without_a_router_is_found_to_be_reachable() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    let volunteer = world.node("client", &["--bootstrap", &boot.address()]);
    waits_for("AutoNAT confirms its address", || volunteer.log().contains("direct=true"));
    assert_eq!(world.reachability(&boot.address(), volunteer.peer_id()), "direct");
    assert_eq!(world.generate(&boot.address()).tokens, local_tokens(TOKENS));
}

#[test]
fn holes_are_punched_also_for_those_who_joined_over_tcp() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let tcp = boot.addresses().into_iter().find(|address| address.contains("/tcp/")).unwrap();
    let _volunteers = halves(&world, &tcp);
    waits_for("a hole is punched", || {
        let generated = world.generation("client", &tcp, MANY_TOKENS).end();
        assert_eq!(generated.network["peers"], 2, "{}", generated.network);
        generated.log.contains("hole punched")
    });
}

#[test]
fn a_hole_is_punched_through_two_routers() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let volunteer = world.node("home-b", &["--bootstrap", &boot.address()]);
    let mut generation = world.generation("home-a", &boot.address(), MANY_TOKENS);
    waits_for("it is reached directly", || {
        let log = generation.log();
        assert!(generation.is_running(), "it ended before a hole was punched:\n{log}\n{}", volunteer.log());
        log.contains("better way")
    });
    assert_eq!(generation.end().tokens, local_tokens(MANY_TOKENS));
}

#[test]
fn the_doctor_tells_which_kind_of_router_stands_before_a_node() {
    for (nat, told) in [(Nat::KeepsPorts, "one port for all"), (Nat::Symmetric, "symmetric")] {
        let Some(world) = World::new(nat) else { return };
        let bootstrap = world.bootstrap();
        let address = bootstrap.address();
        // Two members are needed to compare what they see.
        let listen = ["--listen", "/ip4/203.0.113.20/udp/4001/quic-v1", "--reachable"];
        let _other = world.node("client", &[&["--experts", "all", "--bootstrap", &address], &listen[..]].concat());
        let home = tempfile::tempdir().unwrap();
        let doctor = ["doctor", "--json", "--no-upnp", "--bootstrap", &address];
        let output = world.hanse("home-a", &home).args(doctor).output().unwrap();
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let of =
            |name: &str| document["checks"].as_array().unwrap().iter().find(|check| check["check"] == name).unwrap();
        assert_eq!(of("bootstrap")["outcome"], "ok", "{document}");
        assert_eq!(of("clock")["outcome"], "ok", "{document}");
        assert_eq!(of("nat")["outcome"], "warn", "{document}");
        let found = of("nat")["found"].as_str().unwrap();
        assert!(found.contains("through a relay") && found.contains(told), "{nat:?}: {found}");
        assert!(output.status.success());
    }
}
