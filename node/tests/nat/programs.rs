//! The programs that run in the world.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::world::{PROMPT, tiny_moe, tool};

/// A volunteer process; killed when dropped.
pub(crate) struct Node {
    pub(crate) child: Child,
    pub(crate) ready: Value,
    pub(crate) log: PathBuf,
    pub(crate) _home: TempDir,
}

impl Node {
    pub(crate) fn addresses(&self) -> Vec<String> {
        let addresses = self.ready["addresses"].as_array().unwrap();
        addresses.iter().map(|address| address.as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn address(&self) -> String {
        self.addresses().remove(0)
    }

    pub(crate) fn peer_id(&self) -> &str {
        self.ready["peer_id"].as_str().unwrap()
    }

    /// Where the data plane listens.
    pub(crate) fn data_port(&self) -> u16 {
        self.ready["data_listen"].as_str().unwrap().parse::<SocketAddr>().unwrap().port()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Ends it as its owner would, and waits until it has ended.
    pub(crate) fn leave(&mut self) {
        tool(&format!("kill -TERM {}", self.child.id())).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
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
pub(crate) struct Generation {
    pub(crate) child: Child,
    pub(crate) document: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) _home: TempDir,
}

impl Generation {
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn end(mut self) -> Generated {
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

pub(crate) struct Generated {
    pub(crate) tokens: Value,
    pub(crate) network: Value,
    pub(crate) log: String,
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
pub(crate) fn local_tokens(tokens: &str) -> Value {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.env("HOME", home.path()).env("XDG_CACHE_HOME", home.path()).env("XDG_DATA_HOME", home.path());
    command.args(["generate", "--json", "--local", "--threads", "1", "--prompt", PROMPT, "--max-tokens", tokens]);
    command.arg("--model").arg(tiny_moe());
    Generated::of(&command.output().unwrap()).tokens
}
