//! A node gives way to its owner, and nobody's request fails for it.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::{LOOPBACK, Node, document, hanse, home, run, text, tiny_moe, waits_for};

const ALL: [&str; 2] = ["--experts", "all"];

/// The volunteers that take calls, as a newcomer sees them.
fn serving(address: &str) -> BTreeSet<String> {
    let status = document(["status", "--json", "--bootstrap", address]);
    let peers = status["peers"].as_array().unwrap().iter().filter(|peer| peer["draining"] == false);
    peers.map(|peer| peer["peer_id"].as_str().unwrap().to_owned()).collect()
}

fn ids(nodes: &[&Node]) -> BTreeSet<String> {
    nodes.iter().map(|node| node.peer_id()).collect()
}

/// What `hanse generate` says of so many tokens, computed in one process or by the network joined at an address.
fn generated(bootstrap: Option<&str>, tokens: u32) -> Value {
    let (tokens, model) = (tokens.to_string(), tiny_moe());
    let args = ["generate", "--json", "--prompt", "Once", "--ignore-eos", "--max-tokens", &tokens, "--model"];
    let place = bootstrap.map_or(vec!["--local"], |address| vec!["--bootstrap", address]);
    document(args.into_iter().chain([model.to_str().unwrap()]).chain(place))
}

/// A time zone in which it is this time now.
fn zone_where_it_is(hour: u64, minute: u64, second: u64) -> String {
    const DAY: u64 = 24 * 60 * 60;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % DAY;
    // In POSIX notation what is west of Greenwich is positive.
    let west = (DAY + now - (hour * 60 + minute) * 60 - second) % DAY;
    format!("TEST{}:{:02}:{:02}", west / 3600, west / 60 % 60, west % 60)
}

/// A node with quiet hours from noon until one, for whom it is a given time now.
fn node_with_a_rest_at_noon(bootstrap: &str, zone: &str) -> Node {
    let home = home();
    let mut command = hanse(&home);
    command.env("TZ", zone).args(["node", "--json", "--threads", "1", "--listen", LOOPBACK, "--model"]).arg(tiny_moe());
    command.args(ALL).args(["--bootstrap", bootstrap, "--quiet-hours", "12:00-13:00"]);
    Node::run(command).keeping(home)
}

#[test]
fn when_quiet_hours_begin_calls_go_to_another_replica_and_none_fails() {
    let always = Node::with(&tiny_moe(), ALL);
    let address = always.address();
    let resting = node_with_a_rest_at_noon(&address, &zone_where_it_is(11, 59, 30));
    waits_for("both serve", || serving(&address) == ids(&[&always, &resting]));
    let expected = generated(None, 40)["tokens"].clone();
    waits_for("one rests", || {
        assert_eq!(generated(Some(&address), 40)["tokens"], expected);
        serving(&address) == ids(&[&always])
    });
    let after = generated(Some(&address), 40);
    assert_eq!((&after["tokens"], &after["network"]["peers"]), (&expected, &1.into()));
}

#[test]
fn when_quiet_hours_end_the_node_serves() {
    let always = Node::start(&tiny_moe(), "0-5:0-7", None);
    let address = always.address();
    let resting = node_with_a_rest_at_noon(&address, &zone_where_it_is(12, 59, 40));
    assert_eq!(serving(&address), ids(&[&always]), "the other one rests");
    waits_for("the rest is over", || serving(&address) == ids(&[&always, &resting]));
    // Half of the experts are nowhere else.
    assert_eq!(generated(Some(&address), 20)["tokens"], generated(None, 20)["tokens"]);
}

#[test]
fn pausing_while_tokens_are_generated_costs_no_token_and_hardly_a_call() {
    let first = Node::with(&tiny_moe(), ALL);
    let data = home();
    let data_dir = data.path().to_str().unwrap();
    let more = ["--data-dir", data_dir, "--bootstrap", &first.address()];
    let second = Node::with(&tiny_moe(), ALL.into_iter().chain(more));
    waits_for("both serve", || serving(&first.address()) == ids(&[&first, &second]));
    let expected = generated(None, 490)["tokens"].clone();
    let address = first.address();
    let generation = std::thread::spawn(move || generated(Some(&address), 490));
    let say = |word: &str| {
        let output = run([word, "--data-dir", data_dir]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    };
    let mut pauses = 0;
    while !generation.is_finished() {
        say("pause");
        pauses += 1;
        std::thread::sleep(Duration::from_millis(200));
        say("resume");
    }
    let generated = generation.join().unwrap();
    assert_eq!(generated["tokens"], expected);
    // The call that a pause meets is made again, and none after it.
    let retries = generated["network"]["retries"].as_u64().unwrap();
    assert!(retries <= pauses, "{retries} calls made again for {pauses} pauses");
}

/// Processes that keep a core busy each, or would if they were let; at the lowest priority there is.
struct Hogs(Vec<Child>);

impl Hogs {
    fn start(count: usize) -> Self {
        let hog = || {
            let mut command = Command::new("chrt");
            command.args(["--idle", "0", "sh", "-c", "while :; do :; done"]).stdout(Stdio::null()).spawn().unwrap()
        };
        Self((0..count).map(|_| hog()).collect())
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            // It runs until it is killed.
            hog.kill().unwrap();
            hog.wait().unwrap();
        }
    }
}

fn load_average() -> f64 {
    fs::read_to_string("/proc/loadavg").unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "takes minutes, and keeps every core busy"]
fn a_node_gives_way_to_other_programs_and_comes_back_when_they_end() {
    const LONG: Duration = Duration::from_secs(300);
    let waits_long = |wanted: &BTreeSet<String>, address: &str| {
        let begun = Instant::now();
        while serving(address) != *wanted {
            assert!(begun.elapsed() < LONG, "not within {LONG:?}, at a load of {}", load_average());
            std::thread::sleep(Duration::from_secs(1));
        }
        begun.elapsed()
    };
    let always = Node::with(&tiny_moe(), ALL);
    let address = always.address();
    // Well above what the machine does besides.
    let limit = 2.0 * load_average() + 4.0;
    let more = ["--bootstrap", &address, "--yield-above", &limit.to_string()];
    let yields = Node::with(&tiny_moe(), ALL.into_iter().chain(more));
    waits_long(&ids(&[&always, &yields]), &address);
    let hogs = Hogs::start(3 * limit as usize);
    let gave_way = waits_long(&ids(&[&always]), &address);
    assert_eq!(generated(Some(&address), 20)["network"]["peers"], 1);
    drop(hogs);
    let came_back = waits_long(&ids(&[&always, &yields]), &address);
    println!("limit {limit:.1}: gave way after {gave_way:.0?}, came back after {came_back:.0?}");
}

/// The names of a process's threads, and the processor time that all of them have used.
fn threads_and_time(pid: u32) -> (Vec<String>, Duration) {
    let name = |entry: std::io::Result<fs::DirEntry>| fs::read_to_string(entry.unwrap().path().join("comm")).unwrap();
    let names = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|entry| name(entry).trim().to_owned());
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    (names.collect(), Duration::from_millis(10 * ticks))
}

#[test]
fn a_node_held_to_one_core_computes_on_one_whatever_is_asked_of_it() {
    let home = home();
    let mut command = hanse(&home);
    command.args(["node", "--json", "--max-cores", "1", "--listen", LOOPBACK, "--model"]).arg(tiny_moe()).args(ALL);
    let node = Node::run(command);
    let (pid, address) = (node.child.id(), node.address());
    let (_, before) = threads_and_time(pid);
    let begun = Instant::now();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let address = address.clone();
            std::thread::spawn(move || generated(Some(&address), 200))
        })
        .collect();
    clients.into_iter().for_each(|client| drop(client.join().unwrap()));
    let (threads, after) = threads_and_time(pid);
    let of = |name: &str| threads.iter().filter(|thread| thread.starts_with(name)).count();
    assert_eq!((of("compute-"), of("tokio-rt-worker") > 0), (1, true), "{threads:?}");
    let busy = (after - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("{busy:.2} cores busy, threads {threads:?}");
    assert!(busy < 1.5, "{busy:.2} cores busy: {threads:?}");
}

#[test]
fn more_memory_than_the_owner_allows_is_not_used() {
    const EXPERT: usize = 3 * 128 * 192 * 2;
    let most = (10 * EXPERT + EXPERT / 2).to_string();
    let node = Node::with(&tiny_moe(), ["--memory", "1GiB", "--max-memory", &most]);
    assert_eq!((&node.ready["experts"], &node.ready["expert_bytes"]), (&10.into(), &(10 * EXPERT).into()));
    let (model, named) = (tiny_moe(), ["--listen", LOOPBACK, "--max-memory", &most, "--experts", "all", "--model"]);
    let output = run(["node"].into_iter().chain(named).chain([model.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("more than --max-memory allows"), "{}", text(&output.stderr));
}

#[test]
fn answers_take_no_more_of_the_line_than_the_owner_allows() {
    const RATE: u64 = 128 << 10;
    let limited = Node::with(&tiny_moe(), ALL.into_iter().chain(["--max-bandwidth", "128KiB"]));
    let begun = Instant::now();
    let slow = generated(Some(&limited.address()), 60);
    let seconds = begun.elapsed().as_secs_f64();
    let received = slow["network"]["bytes_received"].as_u64().unwrap();
    assert!(received > 2 * RATE, "{received} bytes are too few to tell");
    // A second's worth may go at once.
    let allowed = RATE as f64 * (seconds + 1.0);
    assert!(received as f64 <= allowed, "{received} bytes in {seconds:.1} s");
    assert_eq!(slow["tokens"], generated(None, 60)["tokens"]);
}
