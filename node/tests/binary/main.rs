//! The program `hanse` as a user meets it: its commands, its documents, its errors and what it leaves behind.

mod chat;
#[cfg(target_os = "linux")]
mod comfort;
mod commands;
mod curves;
mod demo;
mod errors;
mod folders;
mod members;
mod owner;
#[cfg(target_os = "linux")]
mod services;
#[cfg(unix)]
mod testnet;
mod tools;
#[cfg(unix)]
mod web;
mod weights;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// What is waited for comes within this, or the test fails.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOPBACK: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn tiny_moe() -> PathBuf {
    root().join("examples/models/tiny-moe")
}

/// The program, with folders of its own for whatever it keeps.
fn hanse(home: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    for name in ["HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"] {
        command.env(name, home.path());
    }
    command.env_remove("HANSE_LOG").env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    command
}

fn home() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs a command to its end.
fn run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    hanse(&home()).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The one JSON document that a command that succeeds writes on standard output.
fn document<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Value {
    document_of(&run(args))
}

fn document_of(output: &Output) -> Value {
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}{}", text(&output.stderr));
    assert_eq!(stdout.lines().count(), 1, "one document and nothing else: {stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn waits_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal by its name, such as `TERM`.
fn signal(pid: u32, name: &str) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {pid}")).status().unwrap();
    assert!(sent.success());
}

/// A volunteer process; killed when dropped.
struct Node {
    child: Child,
    ready: Value,
    _home: Option<TempDir>,
}

impl Node {
    fn start(model: &Path, experts: &str, bootstrap: Option<&str>) -> Self {
        let bootstrap = bootstrap.iter().flat_map(|address| ["--bootstrap", address]);
        Self::with(model, ["--experts", experts].into_iter().chain(bootstrap))
    }

    fn with<S: AsRef<std::ffi::OsStr>>(model: &Path, args: impl IntoIterator<Item = S>) -> Self {
        let home = home();
        Self::at(&home, model, args).keeping(home)
    }

    /// With whatever it keeps in `home`.
    fn at<S: AsRef<std::ffi::OsStr>>(home: &TempDir, model: &Path, args: impl IntoIterator<Item = S>) -> Self {
        let mut command = hanse(home);
        command.args(["node", "--json", "--threads", "1", "--listen", LOOPBACK, "--model"]).arg(model).args(args);
        Self::run(command)
    }

    /// Runs `hanse node --json` as given.
    fn run(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).unwrap_or_else(|error| panic!("ready line {line:?}: {error}"));
        Self { child, ready, _home: None }
    }

    fn keeping(mut self, home: TempDir) -> Self {
        self._home = Some(home);
        self
    }

    /// Two of them, each with half of every layer's experts of the bundled model.
    fn halves() -> [Self; 2] {
        let first = Self::start(&tiny_moe(), "0-5:0-7", None);
        let second = Self::start(&tiny_moe(), "0-5:8-15", Some(&first.address()));
        [first, second]
    }

    fn peer_id(&self) -> String {
        self.ready["peer_id"].as_str().unwrap().to_owned()
    }

    fn address(&self) -> String {
        self.ready["addresses"][0].as_str().unwrap().to_owned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have been ended by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
