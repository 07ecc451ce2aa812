//! The short programs do what they say, on a network of volunteers in this process.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use futures::StreamExt;
use hanse_model::Checkpoint;
use hanse_node::{Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::{Identity, Multiaddr};
use hanse_router::{Client, GenerateRequest, ModelConfig};

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe")
}

/// A volunteer of the bundled model.
async fn volunteer(experts: &str, bootstrap: &[Multiaddr]) -> Volunteer {
    let checkpoint = Checkpoint::open(&tiny_moe()).unwrap();
    let model = hanse_router::weights::model_id(&checkpoint).unwrap();
    let config = VolunteerConfig {
        hosting: Hosting::Experts(experts.parse().unwrap()),
        bootstrap: bootstrap.to_vec(),
        threads: 1,
        ..VolunteerConfig::default()
    };
    Volunteer::start(&Identity::generate(), &checkpoint, model, config, |_, _| {}).await.unwrap()
}

/// Runs a program to its end.
async fn run(program: &'static str, args: Vec<String>) -> (String, String) {
    let run = move || Command::new(program).args(args).output().unwrap();
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    (String::from_utf8(stdout).unwrap(), stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn query_streams_what_one_process_would_say() {
    const PROMPT: &str = "Once upon a time";
    let first = volunteer("0-5:0-7", &[]).await;
    let _second = volunteer("0-5:8-15", &first.addresses()).await;
    let args = vec![tiny_moe().display().to_string(), first.addresses()[0].to_string(), PROMPT.to_owned()];
    let (text, spoken) = run(env!("CARGO_BIN_EXE_query"), args).await;
    assert!(spoken.contains("from 2 peers"), "{spoken}");

    let load = || Client::local(&ModelConfig { dir: tiny_moe(), threads: 1 }).unwrap();
    let local = tokio::task::spawn_blocking(load).await.unwrap();
    let prompt = local.tokenizer().unwrap().encode(PROMPT, true).unwrap();
    let mut tokens = local.generate(GenerateRequest::greedy(prompt, 64));
    let mut expected = String::new();
    while let Some(token) = tokens.next().await {
        expected += &token.unwrap().text;
    }
    assert_eq!(text, expected + &tokens.summary().unwrap().rest + "\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn own_trunk_calls_every_layer_without_a_model_folder() {
    let hosts = volunteer("all", &[]).await;
    let args = vec![hosts.addresses()[0].to_string(), hosts.model().to_string()];
    let (text, _) = run(env!("CARGO_BIN_EXE_own_trunk"), args).await;
    for layer in 0..6 {
        for row in 0..2 {
            assert!(text.contains(&format!("layer {layer}, row {row}: [")), "{text}");
        }
    }
    assert_eq!(hosts.counts().pairs, 6 * 4, "two rows with two experts each in every layer");
}

/// A program that goes on until it is killed, which dropping does.
struct Running {
    child: Child,
    lines: Option<Lines<BufReader<ChildStdout>>>,
}

impl Running {
    fn start(program: &str, argument: &Multiaddr) -> Self {
        let mut child = Command::new(program).arg(argument.to_string()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = child.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        Self { child, lines }
    }

    /// The next line.
    async fn line(&mut self) -> String {
        let mut lines = self.lines.take().unwrap();
        let read = tokio::task::spawn_blocking(move || (lines.next(), lines));
        let (line, lines) = tokio::time::timeout(std::time::Duration::from_secs(60), read).await.unwrap().unwrap();
        self.lines = Some(lines);
        line.expect("it goes on").unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_network_tells_who_comes_and_who_goes() {
    let first = volunteer("0-5:0-7", &[]).await;
    let mut watching = Running::start(env!("CARGO_BIN_EXE_watch_network"), &first.addresses()[0]);
    let model = first.model();
    assert_eq!(watching.line().await, format!("+ {} hosts 48 experts of {model}", first.peer_id()));
    let second = volunteer("0-5:8-15", &first.addresses()).await;
    let peer = second.peer_id();
    assert_eq!(watching.line().await, format!("+ {peer} hosts 48 experts of {model}"));
    second.shutdown().await;
    loop {
        let line = watching.line().await;
        if line == format!("- {peer} hosts nothing of {model} any more") {
            break;
        }
        assert_eq!(line, format!("~ {peer} takes no calls: it is leaving"), "on its way out");
    }
}
