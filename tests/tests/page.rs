//! The page in a browser: it shows the network as it is, live, and asks nobody but its own server.
//!
//! Skipped where there is no Chromium. With `HANSE_PICTURES=DIR` pictures of it are left in that folder.

use std::time::Duration;

use hanse_model::Checkpoint;
use hanse_node::testnet::split;
use hanse_router::client::layout_of;
use hanse_router::gateway::{GatewayApp, GatewayConfig, Keys, serve};
use hanse_router::view::ViewSource;
use hanse_router::{Client, NetworkConfig};
use hanse_tests::browser::Browser;
use hanse_tests::net::{Net, greedy, runtime, tokens};
use hanse_tests::reference::tiny_moe;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// A peer that dies shows within this.
const NOTICED: Duration = Duration::from_secs(3);
const NODES: usize = 4;

/// A network of four volunteers with two replicas of every expert, a client of it that is busy, and a gateway with the page.
struct Site {
    runtime: Runtime,
    net: Net,
    client: Client,
    address: String,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Site {
    fn start() -> Self {
        Self::with_keys(None)
    }

    fn with_keys(keys: Option<Keys>) -> Self {
        let runtime = runtime();
        let (net, client, address, tasks) = runtime.block_on(async {
            let specs = split(&layout_of(Checkpoint::open(&tiny_moe()).unwrap().spec()), NODES, 2);
            let specs: Vec<&str> = specs.iter().map(String::as_str).collect();
            let net = Net::start(&tiny_moe(), &specs).await;
            let config = NetworkConfig { replica_patience: Duration::from_secs(120), ..net.config() };
            let client = net.client_with(config).await;
            client.network().unwrap().wait_for_peers(NODES, hanse_tests::net::PATIENCE).await;
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let source = ViewSource::client(&client, "tiny-moe", true).unwrap();
            let config = GatewayConfig { keys, ..GatewayConfig::new("tiny-moe") };
            let app = GatewayApp::new(client.clone(), config).unwrap().with_page(source, CancellationToken::new());
            let serving = tokio::spawn(async move { serve(listener, app, std::future::pending()).await.unwrap() });
            let tasks =
                vec![AbortOnDropHandle::new(serving), AbortOnDropHandle::new(tokio::spawn(load(client.clone())))];
            (net, client, address, tasks)
        });
        Self { runtime, net, client, address, _tasks: tasks }
    }

    /// A browser that has opened the page; `None` where there is none.
    fn browser(&self) -> Option<Browser> {
        let Some(mut browser) = Browser::start() else {
            println!("skipped: there is no Chromium here");
            return None;
        };
        browser.resize(1280, 900, false);
        browser.open(&self.address);
        browser.wait_for("document.getElementById('live-text')?.textContent === 'live'");
        Some(browser)
    }

    fn kill(&mut self, volunteer: usize) {
        let _context = self.runtime.enter();
        drop(self.net.volunteers.remove(volunteer));
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.runtime.block_on(self.client.close());
    }
}

/// Two generations at a time, for ever.
async fn load(client: Client) {
    for first in 0.. {
        let requests = [1, 2].map(|i| greedy(&[(first * 7 + i) % 1700, 2, 3], 200));
        futures::future::join_all(requests.into_iter().map(|request| tokens(&client, request))).await;
    }
}

/// The text of an element.
fn text(browser: &mut Browser, id: &str) -> String {
    browser.value(&format!("document.getElementById('{id}').textContent")).as_str().unwrap().to_owned()
}

/// Sets the window's size; nothing makes the page scroll sideways, or a phone show it smaller than it is.
fn fits(browser: &mut Browser, width: u32, height: u32, is_dark: bool) {
    browser.resize(width, height, is_dark);
    browser.wait_for(&format!("innerWidth === {width} && document.documentElement.scrollWidth <= {width}"));
}

#[test]
fn the_page_shows_the_network_live_and_a_killed_peer_within_three_seconds() {
    let mut site = Site::start();
    let Some(mut browser) = site.browser() else { return };
    browser.wait_for("document.getElementById('covered').textContent === '96 of 96'");
    browser.wait_for("Number(document.getElementById('speed').textContent) > 0");
    browser.wait_for("document.querySelectorAll('#peers tr').length === 4");
    browser.wait_for("document.getElementById('trace-note').textContent.includes('through 6 layers')");
    assert!(browser.value("document.getElementById('alarm').hidden").as_bool().unwrap());
    browser.wait_for("(document.getElementById('map').focus(), document.activeElement.id === 'map')");
    browser.press("ArrowRight");
    browser.wait_for("document.getElementById('cell').textContent.startsWith('Layer 0, expert 0 · 2 replicas')");
    browser.picture("light");

    // The first quarter of a layer's experts is hosted by the first two.
    site.kill(1);
    let took = browser.wait_for("document.getElementById('cell').textContent.includes('· 1 replica ·')");
    assert!(took < NOTICED, "after {took:?}");
    browser.wait_for("document.querySelector('#peers .state.lost') !== null");
    assert_eq!(text(&mut browser, "covered"), "96 of 96", "others have its experts");
    fits(&mut browser, 1280, 900, true);
    browser.picture("dark");

    site.kill(0);
    let took = browser.wait_for("!document.getElementById('alarm').hidden");
    assert!(took < NOTICED, "after {took:?}");
    browser.wait_for("document.getElementById('covered').textContent === '72 of 96'");
    let alarm = text(&mut browser, "alarm");
    assert!(alarm.starts_with("✕ 24 experts without a peer: layer 0: "), "{alarm}");
    for (name, width, height, is_dark) in
        [("holes", 1280, 900, false), ("phone", 390, 844, false), ("phone-dark", 390, 844, true)]
    {
        fits(&mut browser, width, height, is_dark);
        browser.picture(name);
    }
    fits(&mut browser, 390, 1800, false);
    browser.picture("phone-long");
    fits(&mut browser, 360, 800, false);

    let address = site.address.clone();
    let elsewhere: Vec<String> =
        browser.requests().into_iter().filter(|url| !url.starts_with(&address) && !url.starts_with("data:")).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn the_chat_streams_an_answer_and_tells_which_peers_computed_it() {
    let site = Site::start();
    let Some(mut browser) = site.browser() else { return };
    browser.wait_for("!document.getElementById('chat').hidden");
    browser.value("document.getElementById('prompt').focus()");
    browser.type_text("Once upon a time there was a small town by the sea");
    browser.order("Input.dispatchKeyEvent", json!({ "type": "keyDown", "key": "Enter", "text": "\r" }));
    browser.wait_for("document.querySelector('#talk .assistant .busy')?.textContent.length > 5");
    assert_eq!(text(&mut browser, "send"), "Stop");
    browser.wait_for("document.querySelectorAll('#talk .assistant footer .id').length >= 2");
    browser.wait_for("document.getElementById('send').textContent === 'Send'");
    fits(&mut browser, 1280, 1100, false);
    browser.picture("chat");
    fits(&mut browser, 1280, 1100, true);
    browser.picture("chat-dark");
    browser.value("document.getElementById('chat-new').click()");
    browser.wait_for(
        "document.querySelector('#talk .hint') !== null && document.querySelectorAll('#talk li').length === 1",
    );
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn a_gateway_with_keys_shows_nothing_of_the_network_to_those_without() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("keys"), "secret-1\n").unwrap();
    let site = Site::with_keys(Some(Keys::load(&folder.path().join("keys")).unwrap()));
    let Some(mut browser) = Browser::start() else {
        println!("skipped: there is no Chromium here");
        return;
    };
    browser.open(&site.address);
    let give = |browser: &mut Browser, key: &str| {
        browser.wait_for("document.getElementById('door')?.hidden === false");
        browser.value(&format!(
            "(document.getElementById('key').value = '{key}', document.querySelector('#door button').click())"
        ));
    };
    give(&mut browser, "secret-2");
    browser.wait_for("document.getElementById('door-note').textContent.startsWith('This key')");
    assert_eq!(text(&mut browser, "covered"), "–");
    give(&mut browser, "secret-1");
    browser.wait_for("document.getElementById('covered').textContent === '96 of 96'");
}

#[test]
fn a_large_model_fits_the_page() {
    let Some(mut browser) = Browser::start() else {
        println!("skipped: there is no Chromium here");
        return;
    };
    let site = Site::start();
    let source = include_str!("page/large.js");
    browser.order("Page.addScriptToEvaluateOnNewDocument", json!({ "source": source }));
    browser.resize(1280, 900, false);
    browser.open(&site.address);
    browser.wait_for("document.getElementById('covered')?.textContent === '14846 of 14848'");
    let drawing = "(() => { const began = performance.now(); document.querySelector('input[value=calls]').click(); \
                   return performance.now() - began; })()";
    let milliseconds = browser.value(drawing).as_f64().unwrap();
    assert!(milliseconds < 400.0, "{milliseconds} ms to draw the map");
    fits(&mut browser, 1280, 900, false);
    browser.picture("large-light");
    browser.value("document.querySelector('input[value=replicas]').click()");
    fits(&mut browser, 1280, 900, true);
    browser.picture("large-dark");
    fits(&mut browser, 360, 800, false);
    browser.picture("large-phone");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}
