//! The page of `hanse status --web` and of a gateway, served until it is told to end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Node, PATIENCE, hanse, home, signal, tiny_moe, waits_for};

/// A peer that dies shows within this.
const NOTICED: Duration = Duration::from_secs(3);

fn ask(address: &str, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
    stream
}

fn document(address: &str) -> Value {
    let mut text = String::new();
    ask(address, "/api/network").read_to_string(&mut text).unwrap();
    serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn status_on_the_web_shows_killed_and_silent_peers_within_three_seconds_and_ends_when_told_to() {
    let first = Node::start(&tiny_moe(), "0-5:0-7", None);
    let [killed, silent] =
        ["0-5:8-11", "0-5:12-15"].map(|experts| Node::start(&tiny_moe(), experts, Some(&first.address())));
    let home = home();
    let args = ["status", "--json", "--web", "127.0.0.1:0", "--bootstrap"];
    let mut web = hanse(&home).args(args).arg(first.address()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(web.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("ready line {line:?}: {error}"));
    assert_eq!(ready["model_id"], first.ready["model_id"]);
    let address = ready["address"].as_str().unwrap();

    // Somebody looks at the page: from now on its peers are, too.
    let _events = ask(address, "/api/events");
    waits_for("all experts have a peer", || document(address)["missing"] == 0);
    assert_eq!((&document(address)["chat"], &document(address)["engine"]), (&Value::Bool(false), &Value::Null));
    for (node, name, missing) in [(&killed, "KILL", 24), (&silent, "STOP", 48)] {
        signal(node.child.id(), name);
        let began = Instant::now();
        waits_for("holes", || document(address)["missing"] == missing);
        assert!(began.elapsed() < NOTICED, "{name}: after {:?}", began.elapsed());
    }
    waits_for("both are lost", || {
        let document = document(address);
        document["peers"].as_array().unwrap().iter().filter(|peer| peer["state"] == "lost").count() == 2
    });
    signal(silent.child.id(), "CONT");
    waits_for("it is back", || document(address)["missing"] == 24);

    signal(web.id(), "TERM");
    assert_eq!(web.wait().unwrap().code(), Some(0));
}

#[test]
fn a_gateway_shows_its_network_and_ends_soon_although_a_page_is_open() {
    let nodes = Node::halves();
    let home = home();
    let args = ["gateway", "--json", "--listen", "127.0.0.1:0", "--bootstrap"];
    let mut gateway = hanse(&home);
    gateway.args(args).arg(nodes[0].address()).arg("--model").arg(tiny_moe());
    let mut gateway = gateway.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(gateway.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("ready line {line:?}: {error}"));
    let address = ready["url"].as_str().unwrap().strip_prefix("http://").unwrap();
    let document = document(address);
    assert_eq!((&document["chat"], &document["name"]), (&Value::Bool(true), &ready["model"]));
    let mut events = BufReader::new(ask(address, "/api/events"));
    let mut event = String::new();
    while !event.starts_with("data:") {
        event.clear();
        assert!(events.read_line(&mut event).unwrap() > 0, "an event");
    }
    let began = Instant::now();
    signal(gateway.id(), "TERM");
    assert_eq!(gateway.wait().unwrap().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
}

#[test]
fn a_page_of_a_model_that_nobody_hosts_is_refused() {
    let node = Node::start(&tiny_moe(), "0:0", None);
    let unknown = "ab".repeat(32);
    let address = node.address();
    let output = crate::run(["status", "--web", "127.0.0.1:0", "--bootstrap", &address, "--model", &unknown]);
    let error = crate::text(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("nobody hosts this model"), "{error}");
}
