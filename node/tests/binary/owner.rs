//! What the owner of a machine may ask of the node on it.

use std::process::Stdio;

use crate::{LOOPBACK, Node, document, hanse, home, run, signal, text, tiny_moe, waits_for};

fn node_args() -> Vec<String> {
    ["node", "--json", "--listen", LOOPBACK, "--model", tiny_moe().to_str().unwrap()].map(str::to_owned).into()
}

#[test]
fn a_plan_says_what_would_be_hosted_and_does_nothing() {
    let first = Node::start(&tiny_moe(), "0-5:0-7", None);
    let data = home();
    let data_dir = data.path().join("node");
    let bytes = (48 * 3 * 128 * 192 * 2).to_string();
    let more =
        ["--plan", "--memory", &bytes, "--bootstrap", &first.address(), "--data-dir", data_dir.to_str().unwrap()];
    let plan = document(node_args().into_iter().chain(more.map(str::to_owned)));
    assert_eq!((&plan["experts"], &plan["members"]), (&48.into(), &1.into()));
    let layers = plan["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["experts"] == "8-15" && layer["why"] == "nobody hosts them"), "{plan}");
    assert!(!data_dir.exists(), "nothing was written");
}

#[test]
fn memory_that_holds_nothing_is_refused_with_what_the_smallest_expert_needs() {
    for plan in [&["--plan"][..], &[]] {
        let output =
            run(node_args().into_iter().chain(["--memory", "100KiB"].iter().chain(plan).map(ToString::to_string)));
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains(&(3 * 128 * 192 * 2).to_string()), "{error}");
    }
}

#[test]
fn a_data_folder_in_use_is_refused_and_one_whose_node_was_killed_is_not() {
    let data = home();
    let named = ["--experts", "0:0", "--data-dir", data.path().to_str().unwrap()];
    let mut first = Node::with(&tiny_moe(), named);
    let output = run(node_args().into_iter().chain(named.map(str::to_owned)));
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("in use") && error.contains(&first.child.id().to_string()), "{error}");
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(data.path().join("control.sock").exists(), "as a power loss leaves it");
    let again = Node::with(&tiny_moe(), named);
    assert_eq!(again.ready["peer_id"], first.ready["peer_id"]);
}

#[test]
fn a_node_pauses_and_resumes_when_its_owner_says_so() {
    let data = home();
    let data_dir = data.path().to_str().unwrap();
    let mut node = Node::with(&tiny_moe(), ["--experts", "0:0", "--data-dir", data_dir]);
    let say = |word: &str| {
        let output = run([word, "--data-dir", data_dir]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert_eq!(say("pause"), "paused: asked to\n");
    assert_eq!(say("pause"), "paused: asked to\n");
    assert_eq!(say("ready"), "paused: asked to\n");
    assert_eq!(say("resume"), "serving\n");
    assert_eq!(say("ready"), "serving\n");
    signal(node.child.id(), "TERM");
    waits_for("the node leaves", || node.child.try_wait().unwrap().is_some());
    let output = run(["pause", "--data-dir", data_dir]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no node answers"), "{}", text(&output.stderr));
}

#[test]
fn quiet_hours_that_are_none_are_wrong_arguments() {
    let mut command = hanse(&home());
    let output = command.args(node_args()).args(["--quiet-hours", "22-7"]).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
