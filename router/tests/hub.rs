//! Weights from a hub's repository: redirects, servers that are busy, broken or cut off, and ones that ignore ranges.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hanse_model::Checkpoint;
use hanse_protocol::{Identity, SignedManifest};
use hanse_router::weights::{Cache, Fetcher, Hub, Item, RemoteModel, Repository, Source, What, describe};
use hanse_router::{Fallback, LocalFallback};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/models/tiny-moe")
}

/// A request as the server saw it.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    range: Option<(usize, usize)>,
    token: Option<String>,
}

/// What is done with the request of this number.
type Script = dyn Fn(usize, &Seen) -> Reply + Send + Sync;

#[derive(Debug, Clone)]
enum Reply {
    /// The file, by range if one was asked for.
    File,
    /// All of the file, whatever was asked for.
    Whole,
    /// The range, with a byte changed.
    Wrong,
    /// Half of the body, then the end of the connection.
    Cut,
    Status(&'static str),
    Redirect(String),
}

struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Serves the folder below `/org/name/resolve/main/`.
    async fn start(dir: PathBuf, script: impl Fn(usize, &Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Script> = Arc::new(script);
        let (log, dir) = (seen.clone(), Arc::new(dir));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, dir.clone(), log.clone(), script.clone()));
            }
        });
        Self { url, seen }
    }

    fn hub(&self) -> Hub {
        Hub::new(&self.url, Some("secret"), "hf:org/name".parse().unwrap()).unwrap()
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

/// One request for each connection.
async fn answer(
    mut stream: TcpStream,
    dir: Arc<PathBuf>,
    log: Arc<Mutex<Vec<Seen>>>,
    script: Arc<Script>,
) -> Option<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(request).ok()?;
    let header = |name: &str| {
        let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let range = header("range").and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse().ok()?, end.parse::<usize>().ok()? + 1))
    });
    let seen = Seen { path: text.split(' ').nth(1)?.to_owned(), range, token: header("authorization") };
    let reply = {
        let mut log = log.lock().unwrap();
        log.push(seen.clone());
        script(log.len() - 1, &seen)
    };
    let plain = |status: &str, extra: &str| {
        format!("HTTP/1.1 {status}\r\nconnection: close\r\n{extra}content-length: 0\r\n\r\n")
    };
    let content = std::fs::read(dir.join(seen.path.rsplit('/').next()?));
    let (head, body) = match (reply, content) {
        (Reply::Status(status), _) => (plain(status, "retry-after: 0\r\n"), Vec::new()),
        (Reply::Redirect(to), _) => (plain("302 Found", &format!("location: {to}\r\n")), Vec::new()),
        (_, Err(_)) => (plain("404 Not Found", ""), Vec::new()),
        (reply, Ok(content)) => {
            let by_range = seen.range.filter(|_| !matches!(reply, Reply::Whole));
            let (start, end) = by_range.unwrap_or((0, content.len()));
            let mut body = content[start..end.min(content.len())].to_vec();
            let status = if by_range.is_some() { "206 Partial Content" } else { "200 OK" };
            let head = format!(
                "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\n\r\n",
                body.len(),
                end - 1,
                content.len()
            );
            match reply {
                Reply::Cut => body.truncate(body.len() / 2),
                Reply::Wrong => body[0] ^= 1,
                _ => {}
            }
            (head, body)
        }
    };
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.write_all(&body).await.ok()?;
    stream.shutdown().await.ok()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends") })
}

/// The bundled model without a manifest, and its manifest.
fn manifest() -> SignedManifest {
    let described = describe(&Checkpoint::open(&tiny_moe()).unwrap(), &mut |_, _| {}).unwrap();
    SignedManifest::sign(described.manifest, &Identity::generate()).unwrap()
}

/// Fetches two experts and a tensor, and checks them against the folder.
async fn fetch_some(source: Arc<dyn Source>, signed: &SignedManifest) -> Result<u64, String> {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::new(dir.path(), u64::MAX).unwrap();
    let fetcher = Fetcher::new(cache, vec![source], None, Duration::from_secs(5));
    let manifest = signed.manifest();
    let mut bytes = 0;
    for what in [
        What::Expert { layer: 1, expert: 3 },
        What::Expert { layer: 4, expert: 0 },
        What::Trunk("model.embed_tokens.weight".into()),
        What::File("tokenizer.json".into()),
    ] {
        let item = Item::find(manifest, what).unwrap();
        fetcher.fetch(&item).await.map_err(|error| error.to_string())?;
        assert!(fetcher.cache().has(&item.blob));
        bytes += item.blob.bytes;
    }
    assert!(fetcher.bytes() >= bytes);
    Ok(fetcher.bytes() - bytes)
}

#[test]
fn only_the_bytes_that_are_needed_are_read() {
    run(async {
        let signed = manifest();
        let server = Server::start(tiny_moe(), |_, _| Reply::File).await;
        let source = Arc::new(server.hub().find(signed.manifest().clone()).await.unwrap());
        let headers = server.seen().len();
        assert_eq!(fetch_some(source, &signed).await, Ok(0));
        assert!(server.seen()[headers..].iter().all(|seen| seen.range.is_some()));
        assert!(server.seen().iter().all(|seen| seen.path.starts_with("/org/name/resolve/main/")));
        assert!(server.seen().iter().all(|seen| seen.token.as_deref() == Some("Bearer secret")));
    });
}

#[test]
fn a_server_that_is_busy_broken_or_cut_off_is_asked_again() {
    run(async {
        let signed = manifest();
        for trouble in [
            Reply::Status("429 Too Many Requests"),
            Reply::Status("503 Service Unavailable"),
            Reply::Status("500 Internal Server Error"),
            Reply::Cut,
        ] {
            let again = trouble.clone();
            // Every fifth request goes wrong, from the first on.
            let script =
                move |number: usize, _: &Seen| if number.is_multiple_of(5) { again.clone() } else { Reply::File };
            let server = Server::start(tiny_moe(), script).await;
            let source = server.hub().find(signed.manifest().clone()).await;
            let source = Arc::new(source.unwrap_or_else(|error| panic!("{trouble:?}: {error}")));
            assert!(fetch_some(source, &signed).await.is_ok(), "{trouble:?}");
        }
    });
}

#[test]
fn a_server_that_ignores_ranges_is_good_enough() {
    run(async {
        let signed = manifest();
        let server = Server::start(tiny_moe(), |_, _| Reply::Whole).await;
        let source = Arc::new(server.hub().find(signed.manifest().clone()).await.unwrap());
        assert_eq!(fetch_some(source, &signed).await, Ok(0));
    });
}

#[test]
fn a_redirect_is_followed_and_the_token_stays_with_the_endpoint() {
    run(async {
        let signed = manifest();
        let store = Server::start(tiny_moe(), |_, _| Reply::File).await;
        let to = store.url.clone();
        let script = move |_: usize, seen: &Seen| Reply::Redirect(format!("{to}{}", seen.path));
        let server = Server::start(tiny_moe(), script).await;
        let source = Arc::new(server.hub().find(signed.manifest().clone()).await.unwrap());
        assert_eq!(fetch_some(source, &signed).await, Ok(0));
        assert!(server.seen().iter().all(|seen| seen.token.is_some()));
        assert!(!store.seen().is_empty() && store.seen().iter().all(|seen| seen.token.is_none()));
    });
}

#[test]
fn wrong_bytes_are_not_used_and_the_error_says_whose_they_were() {
    run(async {
        let signed = manifest();
        let script = |_: usize, seen: &Seen| match seen.range {
            Some((start, _)) if start > 100_000 => Reply::Wrong,
            _ => Reply::File,
        };
        let server = Server::start(tiny_moe(), script).await;
        let source = Arc::new(server.hub().find(signed.manifest().clone()).await.unwrap());
        let error = fetch_some(source, &signed).await.unwrap_err();
        assert!(error.contains("hf:org/name@main") && error.contains("another hash"), "{error}");
    });
}

#[test]
fn a_repository_with_a_manifest_is_a_model() {
    run(async {
        let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for file in
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        {
            std::fs::copy(tiny_moe().join(file), folder.path().join(file)).unwrap();
        }
        let server = Server::start(folder.path().to_owned(), |_, _| Reply::File).await;
        let open = async || {
            let cache = Cache::new(cache.path(), u64::MAX).unwrap();
            RemoteModel::of_hub(server.hub(), cache, &[]).await
        };
        let error = open().await.unwrap_err().to_string();
        assert!(error.contains("has no hanse-manifest.json"), "{error}");
        let described = describe(&Checkpoint::open(folder.path()).unwrap(), &mut |_, _| {}).unwrap();
        let signed = SignedManifest::sign(described.manifest, &Identity::generate()).unwrap();
        std::fs::write(folder.path().join("hanse-manifest.json"), signed.to_json(&described.locations)).unwrap();
        let model = open().await.unwrap();
        assert_eq!(model.id(), signed.id());
        model.fetch_trunk(&|_, _| {}).await.unwrap();
        assert!(model.checkpoint().dir().join("tokenizer.json").exists());

        // An expert without a host is computed from what is fetched, once, and no other expert is.
        let seen = server.seen().len();
        let pool = || Arc::new(hanse_model::compute_pool(1).unwrap());
        let fetching = LocalFallback::new(model.checkpoint().clone(), pool());
        let local = LocalFallback::new(Checkpoint::open(&tiny_moe()).unwrap(), pool());
        let hidden = vec![0.25; 192];
        let computed = tokio::task::spawn_blocking(move || [0; 3].map(|_| fetching.compute(2, 5, &hidden).unwrap()));
        let computed = computed.await.unwrap();
        assert_eq!(computed, [0; 3].map(|_| local.compute(2, 5, &[0.25; 192]).unwrap()));
        assert_eq!(model.cached_experts(), [(2, 5)]);
        let read: usize =
            server.seen()[seen..].iter().map(|seen| seen.range.map_or(0, |(start, end)| end - start)).sum();
        assert_eq!(read as u64, model.checkpoint().sizes().bytes_per_expert[2]);
    });
}

#[test]
fn names_of_repositories_are_read_and_checked() {
    let read = |text: &str| text.parse::<Repository>();
    assert_eq!(read("hf:org/name").unwrap().to_string(), "hf:org/name@main");
    assert_eq!(read("hf:org/name@refs/pr/1").unwrap().revision, "refs/pr/1");
    for wrong in ["org/name", "hf:", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@../x", "hf:a b/c", "hf:a/b?x"]
    {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}
