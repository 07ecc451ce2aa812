//! Experts without a host: waited for, then computed by the client itself if it may.

use std::sync::Arc;
use std::time::Duration;

use hanse_model::{Checkpoint, compute_pool};
use hanse_node::{Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::{Combine, Identity, WireDtype};
use hanse_router::{Client, LocalFallback, NetworkConfig};
use hanse_tests::givers::{find, founder, joins};
use hanse_tests::net::{Net, greedy, halves, model_config, runtime, tokens};
use hanse_tests::reference::tiny_moe;

const PROMPT: [u32; 5] = [707, 625, 259, 466, 12];
const TOKENS: usize = 24;

async fn expected() -> Vec<u32> {
    let local = tokio::task::spawn_blocking(|| Client::local(&model_config(&tiny_moe())).unwrap()).await.unwrap();
    tokens(&local, greedy(&PROMPT, TOKENS)).await.unwrap().0
}

/// The bundled model's folder.
fn own() -> Checkpoint {
    Checkpoint::open(&tiny_moe()).unwrap()
}

fn falling_back(config: NetworkConfig, checkpoint: Checkpoint) -> NetworkConfig {
    let fallback = LocalFallback::new(checkpoint, Arc::new(compute_pool(1).unwrap()));
    NetworkConfig { replica_patience: Duration::from_millis(100), fallback: Some(Arc::new(fallback)), ..config }
}

#[test]
fn experts_that_nobody_hosts_are_computed_by_the_client() {
    runtime().block_on(async {
        let [first, _] = halves(&tiny_moe());
        let net = Net::start(&tiny_moe(), &[&first]).await;
        let client = net.client_with(falling_back(net.config(), own())).await;
        let (found, used) = tokens(&client, greedy(&PROMPT, TOKENS)).await.unwrap();
        assert_eq!(found, expected().await);
        assert!(used.fallbacks > 0 && used.frames > 0, "{used:?}");
    });
}

#[test]
fn experts_that_nobody_hosts_are_fetched_from_one_who_gives_them_and_no_others_are() {
    runtime().block_on(async {
        // One gives everything and computes next to nothing; the other computes half of it and gives nothing.
        let (giver, id) = founder("0:0").await;
        let network = joins(&giver);
        let [even, _] = halves(&tiny_moe());
        let config = VolunteerConfig {
            bootstrap: network.bootstrap.clone(),
            hosting: Hosting::Experts(even.parse().unwrap()),
            threads: 1,
            ..VolunteerConfig::default()
        };
        let checkpoint = Checkpoint::open(&tiny_moe()).unwrap();
        let _worker = Volunteer::start(&Identity::generate(), &checkpoint, id, config, |_, _| ()).await.unwrap();

        let cache = tempfile::tempdir().unwrap();
        let model = find(id, cache.path(), &network).await;
        model.fetch_trunk(&|_, _| {}).await.unwrap();
        let before = model.fetcher().bytes();
        let network = falling_back(network, model.checkpoint().clone());
        let client = Client::connect_with(model.checkpoint(), 1, id, &Identity::generate(), network).await.unwrap();
        let (found, used) = tokens(&client, greedy(&PROMPT, TOKENS)).await.unwrap();
        assert_eq!(found, expected().await);
        assert!(used.fallbacks > 0 && used.frames > 0, "{used:?}");
        let fetched = model.cached_experts();
        assert!(!fetched.is_empty() && fetched.iter().all(|(_, expert)| expert % 2 == 1), "{fetched:?}");
        let (read, hold) =
            (model.fetcher().bytes() - before, fetched.len() as u64 * checkpoint.sizes().bytes_per_expert[0]);
        assert_eq!(read, hold, "{} experts, each read once", fetched.len());
    });
}

#[test]
fn the_fallback_adds_up_as_a_peer_would() {
    runtime().block_on(async {
        let [_, second] = halves(&tiny_moe());
        let net = Net::start(&tiny_moe(), &[&second]).await;
        let config = NetworkConfig { combine: Some(Combine::Peer), wire: WireDtype::F32, ..net.config() };
        let client = net.client_with(falling_back(config, own())).await;
        let (found, used) = tokens(&client, greedy(&PROMPT, TOKENS)).await.unwrap();
        assert_eq!(found, expected().await);
        assert!(used.fallbacks > 0, "{used:?}");
    });
}

#[test]
fn a_network_that_hosts_everything_never_needs_the_fallback() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let client = net.client_with(falling_back(net.config(), own())).await;
        let (found, used) = tokens(&client, greedy(&PROMPT, TOKENS)).await.unwrap();
        assert_eq!(found, expected().await);
        assert_eq!(used.fallbacks, 0);
    });
}
