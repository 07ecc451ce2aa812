//! A volunteer process from its first line to its last.

use std::process::Stdio;

#[cfg(unix)]
use crate::testnet::Up;
use crate::{LOOPBACK, Node, document, hanse, home, run, signal, text, tiny_moe, waits_for};

#[test]
fn the_ready_line_is_what_others_need() {
    let node = Node::start(&tiny_moe(), "0-2:3", None);
    let ready = &node.ready;
    assert_eq!(ready["experts"], 3);
    let id = ready["model_id"].as_str().unwrap();
    assert!(id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    let peer = ready["peer_id"].as_str().unwrap();
    let addresses = ready["addresses"].as_array().unwrap();
    assert!(!addresses.is_empty());
    for address in addresses {
        let address = address.as_str().unwrap();
        assert!(address.starts_with("/ip4/127.0.0.1/udp/") && address.ends_with(&format!("/p2p/{peer}")), "{address}");
        assert!(!address.contains("/udp/0/"), "{address}");
    }
}

#[test]
fn the_identity_is_kept_in_the_data_folder() {
    let data = home();
    let start = || {
        let args = ["--experts", "0:0", "--data-dir", data.path().to_str().unwrap()];
        Node::with(&tiny_moe(), args).ready["peer_id"].clone()
    };
    let first = start();
    assert_eq!(start(), first);
    assert!(data.path().join("identity.key").exists());
}

#[test]
fn two_nodes_of_one_user_have_identities_of_their_own() {
    let home = home();
    let [first, second] = ["0:0", "0:1"].map(|experts| Node::at(&home, &tiny_moe(), ["--experts", experts]));
    assert_ne!(first.ready["peer_id"], second.ready["peer_id"]);
}

#[cfg(unix)]
#[test]
fn a_node_leaves_in_good_order_when_asked_to() {
    for name in ["TERM", "INT"] {
        let mut node = Node::start(&tiny_moe(), "all", None);
        signal(node.child.id(), name);
        waits_for("the node leaves", || node.child.try_wait().unwrap().is_some());
        assert_eq!(node.child.wait().unwrap().code(), Some(0), "SIG{name}");
    }
}

#[test]
fn memory_takes_the_experts_that_the_network_lacks() {
    let first = Node::start(&tiny_moe(), "0-5:0-7", None);
    let address = first.address();
    let status = || document(["status", "--json", "--bootstrap", &address]);
    waits_for("the first is known", || status()["peers"].as_array().unwrap().len() == 1);
    // Room for half of the experts: exactly the other half.
    let bytes = (48 * 3 * 128 * 192 * 2).to_string();
    let second = Node::with(&tiny_moe(), ["--memory", &bytes, "--bootstrap", &address]);
    assert_eq!(second.ready["experts"], 48);
    let is_complete = |layer: &serde_json::Value| layer["missing"].as_array().unwrap().is_empty();
    waits_for("every expert has a host", || status()["layers"].as_array().unwrap().iter().all(is_complete));
}

#[cfg(unix)]
#[test]
fn an_interrupted_client_leaves_the_nodes_as_they_were() {
    // A token takes a tenth of a second at least, so that the client has not ended when it is interrupted.
    let network = Up::start(&["--nodes", "2", "--rtt", "20ms"]);
    let address = network.ready["bootstrap"].as_str().unwrap();
    let home = home();
    let mut command = hanse(&home);
    command.args(["generate", "--prompt", "Once upon a time", "--max-tokens", "490", "--ignore-eos", "--model"]);
    command.arg(tiny_moe()).args(["--bootstrap", address]).stdout(Stdio::piped()).stderr(Stdio::null());
    for name in ["INT", "KILL"] {
        let mut child = command.spawn().unwrap();
        let mut first = [0; 8];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        signal(child.id(), name);
        waits_for("the client ends", || child.try_wait().unwrap().is_some());
        assert!(!child.wait().unwrap().success());
    }
    let model = tiny_moe();
    let args = ["generate", "--json", "--prompt", "Once", "--max-tokens", "20", "--model", model.to_str().unwrap()];
    let there = document(args.into_iter().chain(["--bootstrap", address]));
    assert_eq!(there["network"]["retries"], 0);
    assert_eq!(there["tokens"], document(args.into_iter().chain(["--local"]))["tokens"]);
    assert_eq!(network.states(), ["running", "running"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_taken_data_port_is_an_error_that_names_it() {
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let model = tiny_moe();
    let args = ["node", "--json", "--listen", LOOPBACK, "--experts", "0:0", "--model", model.to_str().unwrap()];
    let output = run(args.into_iter().chain(["--data-listen", &address]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&address), "{}", text(&output.stderr));
}
