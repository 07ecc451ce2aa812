//! A model that is nowhere but on the network: fetched, cut off, shared, damaged, and too large for the place it is given.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hanse_model::Checkpoint;
use hanse_protocol::{BlobHash, Identity, SignedManifest};
use hanse_router::weights::describe;
use serde_json::Value;

use crate::errors::{contains, copy, error};
use crate::{LOOPBACK, Node, document, document_of, hanse, home, run, signal, text, tiny_moe, waits_for};

/// An expert of the bundled model, and how many there are.
const EXPERT_BYTES: u64 = 3 * 128 * 192 * 2;
const EXPERTS: u64 = 96;
/// What is read beside the experts themselves: the manifest, and a twentieth for whatever must be read twice.
const MORE: u64 = 16 * 1024 + EXPERTS * EXPERT_BYTES / 20;

const GREEDY: [&str; 6] = ["generate", "--json", "--prompt", "Once upon a time", "--max-tokens", "12"];

fn id(node: &Node) -> String {
    node.ready["model_id"].as_str().unwrap().to_owned()
}

fn fetched(node: &Node) -> u64 {
    node.ready["fetched_bytes"].as_u64().unwrap()
}

/// A model by its id, found through a node and kept in `cache`.
fn remote(node: &Node, cache: &Path) -> [String; 6] {
    let cache = cache.to_str().unwrap().to_owned();
    ["--model".into(), id(node), "--bootstrap".into(), node.address(), "--cache-dir".into(), cache]
}

/// The arguments of a volunteer that has nothing but the model's id, without the model.
fn joins(node: &Node, cache: &Path, more: &[&str]) -> Vec<String> {
    let place = ["--bootstrap", &node.address(), "--cache-dir", cache.to_str().unwrap()].map(str::to_owned);
    place.into_iter().chain(more.iter().map(ToString::to_string)).collect()
}

/// The tokens of one process with the model's folder.
fn expected() -> Value {
    let model = tiny_moe();
    document(GREEDY.into_iter().chain(["--local", "--model", model.to_str().unwrap()]))["tokens"].clone()
}

fn generated(node: &Node, cache: &Path) -> Value {
    let output = hanse(&home()).args(GREEDY).args(remote(node, cache)).output().unwrap();
    document_of(&output)["tokens"].clone()
}

/// Whole blobs in a cache.
fn blobs(cache: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(cache.join("blobs")) else { return Vec::new() };
    let mut blobs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    blobs.retain(|path| path.file_name().unwrap().to_str().unwrap().parse::<BlobHash>().is_ok());
    blobs.sort();
    blobs
}

#[test]
fn an_empty_cache_gives_the_tokens_of_the_folder() {
    let nodes = Node::halves();
    let cache = home();
    let expected = expected();
    for _ in 0..2 {
        assert_eq!(generated(&nodes[0], cache.path()), expected);
    }
    let chat = |place: &[String]| {
        let mut command = hanse(&home());
        command.args(["chat", "--temperature", "0", "--max-tokens", "12"]).args(place);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"Hello\nAnd then?\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let cache = home();
    let here = chat(&["--local".into(), "--model".into(), tiny_moe().to_str().unwrap().into()]);
    assert!(here.lines().count() >= 2, "{here}");
    assert_eq!(chat(&remote(&nodes[1], cache.path())), here);
}

#[test]
fn a_node_that_knows_the_id_alone_joins_and_reads_what_it_hosts() {
    let nodes = Node::halves();
    let third = Node::start(&tiny_moe(), "0-2:0-15", Some(&nodes[0].address()));
    let cache = home();
    let began = Instant::now();
    let memory = (32 * EXPERT_BYTES).to_string();
    let joined = Node::with(id(&third).as_ref(), joins(&nodes[0], cache.path(), &["--memory", &memory]));
    let took = began.elapsed();
    let read = fetched(&joined);
    println!("32 experts fetched, loaded and announced after {took:?}; {read} bytes read");
    assert_eq!(joined.ready["experts"], 32);
    assert_eq!(joined.ready["model_id"], nodes[0].ready["model_id"]);
    let hosts = 32 * EXPERT_BYTES;
    assert!(read >= hosts && read <= hosts + 16 * 1024 + hosts / 20, "{read} bytes read to host {hosts}");
    let peer = joined.ready["peer_id"].clone();
    waits_for("the network knows it", || {
        let status = document(["status", "--json", "--bootstrap", &nodes[1].address()]);
        status["peers"].as_array().unwrap().iter().any(|p| p["peer_id"] == peer && p["experts"] == 32)
    });
    // It comes back: what it takes is on its disk.
    drop(joined);
    let again = Node::with(id(&third).as_ref(), self::joins(&nodes[0], cache.path(), &["--memory", &memory]));
    assert_eq!((&again.ready["experts"], fetched(&again)), (&32.into(), 0));
}

/// Killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(unix)]
#[test]
fn a_node_that_is_killed_while_it_fetches_goes_on_where_it_was() {
    // It takes about seven seconds to fetch everything.
    let founder = Node::with(&tiny_moe(), ["--experts", "0:0", "--give-rate", "2MiB"]);
    let cache = home();
    let mut random = 29u32;
    let mut before = 0;
    for round in 0..8 {
        let (home, began) = (home(), Instant::now());
        let mut command = hanse(&home);
        command.args(["node", "--json", "--threads", "1", "--listen", LOOPBACK, "--model", &id(&founder)]);
        command.args(joins(&founder, cache.path(), &["--experts", "all"]));
        let child = Killed(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        // At a random moment after it has begun to fetch.
        waits_for("more is fetched", || blobs(cache.path()).len() > before);
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        std::thread::sleep(Duration::from_millis(u64::from(random >> 16) % 400));
        drop(child);
        before = blobs(cache.path()).len();
        println!("round {round}: {before} of {EXPERTS} experts in the cache, after {:?}", began.elapsed());
        if before as u64 > EXPERTS - 12 {
            break;
        }
    }
    assert!(before > 0 && (before as u64) < EXPERTS, "{before}");
    let node = Node::with(id(&founder).as_ref(), joins(&founder, cache.path(), &["--experts", "all"]));
    let (read, missing) = (fetched(&node), (EXPERTS - before as u64) * EXPERT_BYTES);
    println!("{read} bytes read for {missing} that were missing");
    assert_eq!(node.ready["experts"], EXPERTS);
    assert!(read <= missing + 16 * 1024, "{read} bytes read for {missing} that were missing");
    drop(founder);
    // Its own founder is gone; it has everything but the trunk, which the folder of the client holds.
    let model = tiny_moe();
    let place = ["--model", model.to_str().unwrap(), "--bootstrap", &node.address()].map(str::to_owned);
    assert_eq!(document(GREEDY.into_iter().map(str::to_owned).chain(place))["tokens"], expected());
}

#[cfg(unix)]
#[test]
fn a_node_that_still_fetches_is_not_ready_and_leaves_when_asked_to() {
    let founder = Node::with(&tiny_moe(), ["--experts", "0:0", "--give-rate", "512KiB"]);
    let (cache, home, data) = (home(), home(), home());
    let mut command = hanse(&home);
    command.args(["node", "--json", "--threads", "1", "--listen", LOOPBACK, "--model", &id(&founder)]);
    command.args(joins(&founder, cache.path(), &["--experts", "all"])).arg("--data-dir").arg(data.path());
    let mut child = Killed(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    waits_for("something is fetched", || !blobs(cache.path()).is_empty());
    let early = run(["ready", "--data-dir", data.path().to_str().unwrap()]);
    assert_eq!(early.status.code(), Some(1));
    assert!(text(&early.stderr).contains("experts are still being loaded"), "{}", text(&early.stderr));
    let asked = Instant::now();
    signal(child.0.id(), "TERM");
    waits_for("it leaves", || child.0.try_wait().unwrap().is_some());
    println!("left after {:?}, with {} experts fetched", asked.elapsed(), blobs(cache.path()).len());
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    // All of it takes half a minute.
    assert!((blobs(cache.path()).len() as u64) < EXPERTS);
}

#[test]
fn two_processes_that_share_a_cache_read_everything_once() {
    let founder = Node::start(&tiny_moe(), "0:0", None);
    let cache = home();
    let start = || Node::with(id(&founder).as_ref(), joins(&founder, cache.path(), &["--experts", "all"]));
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(start);
        (start(), one.join().unwrap())
    });
    let read = fetched(&one) + fetched(&other);
    println!("{} and {} bytes read", fetched(&one), fetched(&other));
    let all = EXPERTS * EXPERT_BYTES;
    assert!((all..=all + MORE).contains(&read), "{read}");
    let tokens = expected();
    std::thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(|| generated(&founder, cache.path())));
        assert!(clients.into_iter().all(|client| client.join().unwrap() == tokens));
    });
}

#[test]
fn a_cache_that_is_too_small_is_said_to_be_so() {
    let founder = Node::start(&tiny_moe(), "all", None);
    let cache = home();
    let client = GREEDY.into_iter().map(str::to_owned).chain(remote(&founder, cache.path()));
    contains(&error(client.chain(["--cache-size".into(), "300KiB".into()])), &["307200 bytes", "raise --cache-size"]);
    for which in [["--experts", "all"], ["--memory", "10MiB"]] {
        let node = ["node", "--json", "--listen", LOOPBACK, "--model", &id(&founder)].map(str::to_owned);
        let place = joins(&founder, cache.path(), &["--cache-size", "1MiB", which[0], which[1]]);
        contains(&error(node.into_iter().chain(place)), &["1048576 bytes", "raise --cache-size"]);
    }
}

/// Runs a command; whether it succeeded.
fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_clear_line_and_what_was_fetched_is_used_later() {
    let cache = home();
    let mount = cache.path().to_str().unwrap();
    if !succeeds("mount", &["-t", "tmpfs", "-o", "size=3m", "tmpfs", mount]) {
        println!("skipped: file systems may not be mounted here");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let founder = Node::start(&tiny_moe(), "all", None);
        let node = ["node", "--json", "--listen", LOOPBACK, "--model", &id(&founder)].map(str::to_owned);
        let place = joins(&founder, cache.path(), &["--experts", "all"]);
        contains(&error(node.into_iter().chain(place)), &["the disk is full", "what is there is kept"]);
        let client = GREEDY.into_iter().map(str::to_owned).chain(remote(&founder, cache.path()));
        contains(&error(client), &["the disk is full"]);
        let kept = blobs(cache.path()).len() as u64;
        assert!(kept > 8, "{kept} blobs are kept");
        assert!(succeeds("mount", &["-o", "remount,size=40m", mount]));
        let node = Node::with(id(&founder).as_ref(), joins(&founder, cache.path(), &["--experts", "all"]));
        assert!(fetched(&node) < EXPERTS * EXPERT_BYTES - 8 * EXPERT_BYTES, "{}", fetched(&node));
    });
    assert!(succeeds("umount", &["-l", mount]));
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn a_damaged_cache_is_repaired() {
    let founder = Node::start(&tiny_moe(), "all", None);
    let cache = home();
    let expected = expected();
    assert_eq!(generated(&founder, cache.path()), expected);
    let blobs = blobs(cache.path());
    let spoil = |path: &Path, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    for (number, blob) in blobs.iter().enumerate() {
        match number % 4 {
            0 => spoil(blob, &|bytes| bytes[0] ^= 1),
            1 => spoil(blob, &|bytes| bytes.truncate(bytes.len() / 2)),
            2 => {
                std::fs::remove_file(blob).unwrap();
                std::fs::write(blob.with_extension("part"), b"rubbish").unwrap();
                std::fs::write(blob.with_extension("tree"), [7; 64]).unwrap();
            }
            _ => {}
        }
    }
    for name in ["blobs/what is this", "blobs/0123.part", "users/nobody", "users/1-2", "more"] {
        std::fs::write(cache.path().join(name), [0xff; 300]).unwrap();
    }
    let files = cache.path().join("models").join(id(&founder));
    for file in ["manifest", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert!(files.join(file).exists(), "{file}");
        std::fs::write(files.join(file), b"{").unwrap();
    }
    assert_eq!(generated(&founder, cache.path()), expected);
    let node = Node::with(id(&founder).as_ref(), joins(&founder, cache.path(), &["--experts", "3:0-15"]));
    assert_eq!(node.ready["experts"], 16);
}

#[test]
fn a_manifest_with_a_wrong_signature_or_hash_is_refused_by_name() {
    let dir = copy();
    let model = dir.path().to_str().unwrap();
    let node = ["node", "--json", "--listen", LOOPBACK, "--experts", "2:3", "--model", model];
    let local = ["generate", "--local", "--json", "--prompt-ids", "1", "--model", model];
    assert_eq!(run(["manifest", model]).status.code(), Some(0));
    let path = dir.path().join("hanse-manifest.json");
    let good = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, good.replacen("\"family\":\"", "\"family\":\"x", 1)).unwrap();
    for command in [&node[..], &local[..]] {
        contains(&error(command), &["hanse-manifest.json", "signature is wrong"]);
    }
    // One that its publisher signed, of other weights.
    let mut described = describe(&Checkpoint::open(dir.path()).unwrap(), &mut |_, _| {}).unwrap();
    described.manifest.experts[2].hashes[3] = BlobHash([9; 32]);
    let signed = SignedManifest::sign(described.manifest, &Identity::generate()).unwrap();
    std::fs::write(&path, signed.to_json(&described.locations)).unwrap();
    for command in [&node[..], &local[..]] {
        contains(&error(command), &["expert 3 of layer 2", "not the one of the manifest"]);
    }
}

#[test]
fn a_giver_with_other_bytes_than_it_says_is_found_out_and_another_is_asked() {
    // Its manifest is the good one, its weights are not; it hosts an expert that is right.
    let liar = copy();
    assert_eq!(run(["manifest", liar.path().to_str().unwrap()]).status.code(), Some(0));
    let path = liar.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = bytes.len();
    bytes[length / 2..].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&path, bytes).unwrap();
    let first = Node::start(liar.path(), "0:0", None);
    let honest = Node::start(&tiny_moe(), "all", Some(&first.address()));
    assert_eq!(id(&first), id(&honest));
    let cache = home();
    let node = Node::with(id(&honest).as_ref(), joins(&honest, cache.path(), &["--experts", "all"]));
    assert_eq!(node.ready["experts"], EXPERTS);
    assert_eq!(generated(&honest, home().path()), expected());
}

#[test]
fn answers_and_weights_share_one_limit_and_answers_go_first() {
    const RATE: u64 = 2 << 20;
    let founder = Node::with(&tiny_moe(), ["--experts", "all", "--max-bandwidth", "2MiB"]);
    let cache = home();
    let (tokens, model) = (expected(), tiny_moe());
    let client = ["--model", model.to_str().unwrap(), "--bootstrap", &founder.address()].map(str::to_owned);
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| {
            let began = Instant::now();
            let node = Node::with(id(&founder).as_ref(), joins(&founder, cache.path(), &["--experts", "all"]));
            (fetched(&node), began.elapsed())
        });
        let mut slowest = 0.0f64;
        while !fetching.is_finished() {
            let found = document(GREEDY.into_iter().map(str::to_owned).chain(client.clone()));
            assert_eq!(found["tokens"], tokens);
            slowest = slowest.max(found["timings"]["decode_ms"].as_f64().unwrap());
        }
        let (bytes, took) = fetching.join().unwrap();
        println!("{bytes} bytes of weights in {took:?}; 12 tokens took up to {slowest:.0} ms meanwhile");
        // A second's worth may go at once.
        assert!(took.as_secs_f64() >= bytes as f64 / RATE as f64 - 1.5, "faster than the limit");
        assert!(took < Duration::from_secs(30), "weights have what answers leave, which is nearly all");
        assert!(slowest < 4000.0, "answers do not wait for weights");
    });
}
