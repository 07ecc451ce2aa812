//! What a user sees when something is wrong: one clear line on standard error, nothing on standard output, and a status.

use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{LOOPBACK, Node, hanse, home, run, text, tiny_moe};

/// The one line on standard error of a command that fails with status 1.
pub(crate) fn error<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let output = run(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(text(&output.stdout), "");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one line: {stderr}");
    println!("{stderr}");
    lines[0].strip_prefix("error: ").expect("it says that it is an error").to_owned()
}

pub(crate) fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} names {part:?}");
    }
}

/// A copy of the bundled model that a test may spoil.
pub(crate) fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        std::fs::copy(tiny_moe().join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// A copy with one key of its `config.json` changed, or removed where `value` is null.
fn with_key(key: &str, value: Value) -> TempDir {
    let dir = copy();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    if value.is_null() {
        config.as_object_mut().unwrap().remove(key).unwrap();
    } else {
        config[key] = value;
    }
    std::fs::write(path, config.to_string()).unwrap();
    dir
}

/// What `inspect`, `node` and `generate --local` say of a folder: the same.
fn folder_error(dir: &Path) -> String {
    let dir = dir.to_str().unwrap();
    let messages = [
        error(["inspect", "--json", "--model", dir]),
        error(["node", "--json", "--listen", LOOPBACK, "--model", dir]),
        error(["generate", "--local", "--json", "--prompt-ids", "1", "--model", dir]),
    ];
    assert!(messages.iter().all(|message| *message == messages[0]), "{messages:?}");
    messages[0].clone()
}

#[test]
fn an_unknown_family_is_named_with_those_that_are_known() {
    let dir = with_key("model_type", json!("gpt2"));
    contains(&folder_error(dir.path()), &["gpt2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe"]);
}

#[test]
fn instructions_that_this_machine_has_not_are_refused_by_every_command() {
    let model = tiny_moe();
    let model = model.to_str().unwrap();
    let home = home();
    for args in [&["inspect", "--model", model][..], &["completions", "bash"], &["node", "--model", model]] {
        let output = hanse(&home).env("HANSE_ISA", "avx-512").args(args).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()), "{stderr}");
        contains(&stderr, &["error: HANSE_ISA", "avx-512", "portable"]);
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    let output = hanse(&home).env("HANSE_ISA", "portable").args(["inspect", "--model", model]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn a_key_that_is_missing_or_nonsense_is_named() {
    contains(&folder_error(with_key("hidden_size", Value::Null).path()), &["has no `hidden_size`"]);
    contains(&folder_error(with_key("num_attention_heads", json!("six")).path()), &["num_attention_heads", "six"]);
    contains(&folder_error(with_key("num_experts_per_tok", json!(17)).path()), &["num_experts_per_tok", "17"]);
    contains(&folder_error(with_key("rms_norm_eps", json!(-1.0)).path()), &["rms_norm_eps", "-1"]);
}

#[test]
fn a_folder_without_config_or_weights_is_named() {
    let dir = copy();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    contains(&folder_error(dir.path()), &["model.safetensors", dir.path().to_str().unwrap()]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    contains(&folder_error(dir.path()), &["config.json"]);
    contains(&folder_error(&dir.path().join("nowhere")), &["nowhere"]);
}

#[test]
fn truncated_weights_are_refused_with_the_bytes_they_should_have() {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(length - 1000).unwrap();
    contains(
        &folder_error(dir.path()),
        &["model.safetensors", "truncated", &length.to_string(), &(length - 1000).to_string()],
    );
}

#[test]
fn a_tensor_of_a_wrong_shape_is_named_with_both_shapes() {
    let dir = with_key("moe_intermediate_size", json!(64));
    contains(&folder_error(dir.path()), &["experts", "[128, 192]", "[64, 192]"]);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let model = tiny_moe();
    let ids = vec!["5"; 600].join(",");
    let local = ["generate", "--local", "--json", "--prompt-ids", &ids, "--model", model.to_str().unwrap()];
    contains(&error(local), &["600", "512", "context"]);
    contains(&error(["score", "--json", "--prompt-ids", &ids, "--model", model.to_str().unwrap()]), &["600", "512"]);
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_also_on_a_network() {
    let model = tiny_moe();
    let model = model.to_str().unwrap();
    let message = error(["generate", "--local", "--json", "--prompt-ids", "1,4096", "--model", model]);
    contains(&message, &["4096", "vocabulary"]);
    let node = Node::start(&tiny_moe(), "all", None);
    let address = node.address();
    let there = error(["generate", "--json", "--prompt-ids", "1,4096", "--bootstrap", &address, "--model", model]);
    assert_eq!(there, message);
}

#[cfg(unix)]
#[test]
fn a_full_or_closed_output_is_an_error_and_no_panic() {
    let model = tiny_moe();
    let args = ["inspect", "--model", model.to_str().unwrap()];
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = hanse(&home()).args(args).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    contains(&text(&output.stderr), &["No space left"]);
    let mut closed = hanse(&home()).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(closed.stdout.take());
    let output = closed.wait_with_output().unwrap();
    assert_eq!(text(&output.stderr), "", "whoever read has seen enough");
}

#[cfg(unix)]
#[test]
fn a_text_without_end_is_refused() {
    let model = tiny_moe();
    let message = error(["score", "--file", "/dev/zero", "--model", model.to_str().unwrap()]);
    contains(&message, &["/dev/zero", "too long"]);
}

fn generate_over(model: &Path, bootstrap: &str, timeout: &str) -> String {
    let model = model.to_str().unwrap();
    error([
        "generate",
        "--json",
        "--prompt-ids",
        "1",
        "--join-timeout",
        timeout,
        "--bootstrap",
        bootstrap,
        "--model",
        model,
    ])
}

#[test]
fn an_address_where_nobody_is_gives_no_peer_reachable() {
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("/ip4/127.0.0.1/udp/{closed}/quic-v1");
    contains(&generate_over(&tiny_moe(), &address, "1"), &["no peer reachable"]);
    contains(&error(["status", "--json", "--bootstrap", &address]), &["no peer reachable"]);
}

#[test]
fn an_address_where_somebody_else_is_says_who() {
    let node = Node::start(&tiny_moe(), "none", None);
    let (place, found) = node.address().rsplit_once("/p2p/").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let expected = hanse_protocol::Identity::generate().peer_id().to_string();
    let wrong = format!("{place}/p2p/{expected}");
    contains(&generate_over(&tiny_moe(), &wrong, "2"), &[&wrong, &format!("{found} is there, not {expected}")]);
    let status = error(["status", "--json", "--network", "lab", "--bootstrap", &node.address()]);
    contains(&status, &["no peer reachable", "a member of network \"main\" is there"]);
}

#[test]
fn experts_that_nobody_hosts_are_named() {
    let node = Node::start(&tiny_moe(), "0-2,3:0-12,4-5", None);
    contains(&generate_over(&tiny_moe(), &node.address(), "2"), &["no peer hosts", "layer 3: 13-15"]);
}

#[test]
fn a_network_of_other_weights_is_named() {
    let changed = copy();
    let path = changed.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x80;
    std::fs::write(path, bytes).unwrap();
    let node = Node::start(changed.path(), "all", None);
    let theirs = node.ready["model_id"].as_str().unwrap();
    contains(&generate_over(&tiny_moe(), &node.address(), "20"), &["no peer hosts model", theirs, "differ"]);
}

#[test]
fn experts_that_the_model_does_not_have_cannot_be_hosted() {
    let model = tiny_moe();
    let node =
        |spec| error(["node", "--json", "--listen", LOOPBACK, "--experts", spec, "--model", model.to_str().unwrap()]);
    contains(&node("0:16"), &["layer 0 has no expert 16", "0-15"]);
    contains(&node("6"), &["layer 6 does not exist", "0-5"]);
    let memory = ["node", "--json", "--listen", LOOPBACK, "--memory", "1KiB", "--model", model.to_str().unwrap()];
    contains(&error(memory), &["1024 bytes hold no expert"]);
}

#[test]
fn a_card_that_is_not_there_is_refused_with_what_to_do() {
    let model = tiny_moe();
    // Of a higher number than any machine's, so that it fails where there are some too.
    let node = ["node", "--json", "--listen", LOOPBACK, "--device", "cuda:63", "--model", model.to_str().unwrap()];
    let client = ["generate", "--local", "--prompt", "x", "--device", "cuda:63", "--model", model.to_str().unwrap()];
    for missing in [error(node), error(client)] {
        if cfg!(feature = "cuda") {
            assert!(["NVIDIA driver", "no cuda:63"].iter().any(|why| missing.contains(why)), "{missing}");
        } else {
            contains(&missing, &["computes on the processor only", "--features cuda", "FEATURES=cuda"]);
        }
    }
    if !cfg!(target_vendor = "apple") {
        let metal = |args: &[&str]| error(args.iter().map(|arg| if *arg == "cuda:63" { "metal" } else { *arg }));
        for missing in [metal(&node), metal(&client)] {
            contains(&missing, &["metal is for GPUs of machines by Apple"]);
        }
    }
}

#[test]
fn giving_cards_to_others_needs_cards() {
    let model = tiny_moe();
    let node = |more: &[&str]| {
        let args = ["node", "--json", "--listen", LOOPBACK, "--yield-to-others", "--model", model.to_str().unwrap()];
        error(args.into_iter().chain(more.iter().copied()))
    };
    contains(&node(&["--device", "cpu"]), &["--device cpu none is used", "--yield-above"]);
    if !cfg!(feature = "cuda") {
        contains(&node(&[]), &["--yield-to-others cannot be done here", "computes on the processor only"]);
    }
}

#[cfg(unix)]
#[test]
fn a_key_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("identity.key");
    std::fs::write(&key, b"whatever").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (model, data) = (tiny_moe(), dir.path().to_str().unwrap());
    let args = ["node", "--json", "--listen", LOOPBACK, "--data-dir", data, "--model", model.to_str().unwrap()];
    contains(&error(args), &["identity.key"]);
}

#[test]
fn wrong_arguments_exit_with_2_and_say_what_is_wrong() {
    let model = tiny_moe();
    let model = model.to_str().unwrap();
    let id = "7".repeat(64);
    let cases: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["nonsense"], "nonsense"),
        (&["inspect"], "--model"),
        (&["generate", "--model", model, "--prompt", "x"], "--bootstrap"),
        (&["generate", "--model", model, "--local"], "--prompt"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--prompt-ids", "1"], "--prompt-ids"),
        (&["generate", "--model", model, "--local", "--prompt-ids", "1,x"], "--prompt-ids"),
        (&["generate", "--model", model, "--local", "--bootstrap", LOOPBACK, "--prompt", "x"], "--bootstrap"),
        (&["generate", "--model", model, "--bootstrap", "nowhere", "--prompt", "x"], "nowhere"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--wire", "f8"], "f8"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--combine", "nobody"], "nobody"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--temperature", "NaN"], "--temperature"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--top-p", "1.5"], "--top-p"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--seed", "-1"], "--seed"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--threads", "100000"], "--threads"),
        (&["generate", "--model", model, "--mdns", "--prompt", "x", "--network", "Not a name"], "--network"),
        (&["generate", "--model", model, "--mdns", "--prompt", "x", "--join-timeout", "0"], "--join-timeout"),
        (
            &["generate", "--model", model, "--mdns", "--prompt", "x", "--join-timeout", "18446744073709551615"],
            "--join",
        ),
        (
            &["generate", "--model", &id, "--bootstrap", LOOPBACK, "--fallback", "local", "--prompt", "x"],
            "--fallback fetch",
        ),
        (&["generate", "--model", model, "--mdns", "--prompt", "x", "--fallback", "nobody"], "nobody"),
        (&["generate", "--model", model, "--local", "--prompt", "x", "--device", "cuda:0,cuda:1"], "one card, such as"),
        (&["gateway", "--model", model, "--local", "--device", "cuda"], "one card, such as cuda:0"),
        (&["chat", "--model", model, "--local", "--device", "cuda:0,cpu"], "one card, such as cuda:0"),
        (&["chat", "--model", model], "--bootstrap"),
        (&["score", "--model", model], "--prompt"),
        (&["status"], "--bootstrap"),
        (&["node", "--model", model, "--experts", "0-"], "0-"),
        (
            &["generate", "--model", model, "--local", "--prompt", "x", "--device", "metal:0"],
            "one card, such as cuda:0",
        ),
        (&["node", "--model", model, "--device", "metal:0"], "is no device"),
        (&["node", "--model", model, "--device", "cuda:0,cpu"], "stands alone"),
        (&["node", "--model", model, "--experts", "all", "--memory", "1GiB"], "--memory"),
        (&["demo", "--nodes", "2", "--replicas", "2"], "--replicas"),
        (&["demo", "--nodes", "3", "--replicas", "1", "--kill"], "--kill"),
        (&["demo", "--nodes", "1"], "--nodes"),
    ];
    for (args, part) in cases {
        let output = run(*args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        assert!(stderr.contains(part), "{args:?}: {stderr}");
    }
}

#[test]
fn help_and_version_are_on_standard_output() {
    for args in [&["--help"][..], &["help"], &["generate", "--help"]] {
        let output = run(args);
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
        assert!(text(&output.stdout).contains("Usage: hanse"));
    }
    let help = text(&run(["--help"]).stdout);
    contains(&help, &["demo", "node", "generate", "chat", "score", "status", "inspect"]);
    assert!(text(&run(["--version"]).stdout).starts_with("hanse 0."));
}

#[test]
fn drafts_by_a_head_that_is_not_there_are_refused() {
    let model = tiny_moe();
    let args = ["--draft", "mtp", "--prompt-ids", "1", "--json", "--model", model.to_str().unwrap()];
    let message = error(["generate", "--local"].into_iter().chain(args));
    contains(&message, &["--draft mtp", "no multi-token-prediction head", "family"]);
    // Nobody is looked for before.
    contains(
        &error(["generate", "--bootstrap", "/ip4/127.0.0.1/udp/9/quic-v1"].into_iter().chain(args)),
        &["--draft mtp"],
    );
}
