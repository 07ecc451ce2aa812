//! Volunteers that store experts in fewer bits than published, and clients that do or do not accept them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use hanse_model::{Checkpoint, Experts, LocalExperts, Routing, StoredDtype, compute_pool, quantise_folder};
use hanse_protocol::{Identity, Precision};
use hanse_router::client::layout_of;
use hanse_router::{Client, ClientError, ExpertNetwork, JoinError, NetworkConfig, PrecisionPolicy, Usage};
use hanse_tests::net::{Net, PATIENCE, eventually, greedy, halves, model_config, model_id, runtime, tokens};
use hanse_tests::reference::tiny_moe;

const PROMPT: [u32; 5] = [1, 40, 7, 300, 12];

/// The bundled model with its experts in another dtype.
fn variant(experts: StoredDtype) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&tiny_moe()).unwrap();
    let precision = hanse_model::Precision { experts, trunk: None };
    let original = model_id(&tiny_moe()).to_string();
    quantise_folder(&checkpoint, precision, &original, &["tokenizer.json"], out.path(), &mut |_, _| ()).unwrap();
    out
}

fn config(net: &Net, precision: PrecisionPolicy) -> NetworkConfig {
    NetworkConfig { precision, ..net.config() }
}

async fn client(net: &Net, precision: PrecisionPolicy) -> Client {
    let original = model_id(&tiny_moe());
    Client::connect(&model_config(&tiny_moe()), original, &Identity::generate(), config(net, precision)).await.unwrap()
}

async fn local_tokens(dir: &Path) -> Vec<u32> {
    let client = Client::local_with(&Checkpoint::open(dir).unwrap(), 1).unwrap();
    tokens(&client, greedy(&PROMPT, 48)).await.unwrap().0
}

#[test]
fn a_variant_is_called_only_by_clients_that_accept_it() {
    let eight_bits = variant(StoredDtype::Q8_0);
    runtime().block_on(async {
        let [even, _] = halves(&tiny_moe());
        let published = Net::start(&tiny_moe(), &[&even]).await;
        let _all = published.beside(eight_bits.path(), &["all"]).await;

        let config = NetworkConfig { join_timeout: Duration::from_secs(5), ..published.config() };
        let joined = Client::connect(&model_config(&tiny_moe()), published.model, &Identity::generate(), config).await;
        let Err(ClientError::Join(error)) = joined else { panic!("joined") };
        let JoinError::Incomplete { missing, variants } = &error else { panic!("{error}") };
        assert_eq!((missing.0.len(), &missing.0[&0]), (6, &vec![1, 3, 5, 7, 9, 11, 13, 15]));
        assert_eq!(variants, &[Precision::Q8_0]);
        assert!(error.to_string().ends_with("peers host experts in q8_0, which --precision any accepts"), "{error}");

        for precision in [PrecisionPolicy::EightBits, PrecisionPolicy::Any] {
            let client = client(&published, precision).await;
            let (_, used) = tokens(&client, greedy(&PROMPT, 8)).await.unwrap();
            assert!(used.precisions.contains(&Precision::Q8_0), "{used:?}");
            assert_eq!(used.mixed, 0);
        }
    });
}

#[test]
fn a_network_of_a_variant_alone_gives_the_tokens_of_the_variant() {
    let eight_bits = variant(StoredDtype::Q8_0);
    runtime().block_on(async {
        let [even, odd] = halves(eight_bits.path());
        let net = Net::start(eight_bits.path(), &[&even, &odd]).await;
        let client = client(&net, PrecisionPolicy::EightBits).await;
        let (found, used) = tokens(&client, greedy(&PROMPT, 48)).await.unwrap();
        assert_eq!(found, local_tokens(eight_bits.path()).await);
        assert_eq!((used.precisions, used.mixed), ([Precision::Q8_0].into(), 0));
        // Those who have the variant itself need accept nothing.
        let own = net.client().await;
        let (same, used) = tokens(&own, greedy(&PROMPT, 48)).await.unwrap();
        assert_eq!((same, used.precisions.len()), (found, 0));
    });
}

#[test]
fn each_expert_is_computed_in_one_form_also_where_replicas_store_it_in_several() {
    let (eight_bits, half) = (variant(StoredDtype::Q8_0), variant(StoredDtype::F16));
    runtime().block_on(async {
        let [even, odd] = halves(&tiny_moe());
        let published = Net::start(&tiny_moe(), &[&even]).await;
        let _eight = published.beside(eight_bits.path(), &["all", "all"]).await;
        let _half = published.beside(half.path(), &[&odd]).await;
        let spec = Checkpoint::open(&tiny_moe()).unwrap().spec().clone();
        let join = config(&published, PrecisionPolicy::Any);
        let network =
            ExpertNetwork::join(&Identity::generate(), published.model, layout_of(&spec), join).await.unwrap();
        let all = || network.wait_for_peers(4, PATIENCE);
        assert_eq!(all().await, 4);

        // The even experts are there as published, the odd ones in two forms, of which the nearer one counts.
        let pool = Arc::new(compute_pool(1).unwrap());
        let mut references = [tiny_moe().as_path(), eight_bits.path(), half.path()]
            .map(|dir| LocalExperts::load(&Checkpoint::open(dir).unwrap(), pool.clone()).unwrap());
        let hidden: Vec<f32> = (0..192).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut usage = Usage::default();
        for _ in 0..3 {
            for layer in 0..6u32 {
                for expert in 0..16u32 {
                    let routing = Routing { top_k: 1, experts: vec![expert], weights: vec![1.0] };
                    let found = network.forward(layer, &hidden, &routing, &mut usage).await.unwrap();
                    let matching = references
                        .iter_mut()
                        .map(|local| local.forward(layer as usize, &hidden, &routing).unwrap() == found)
                        .collect::<Vec<bool>>();
                    let expected = if expert % 2 == 0 { 0 } else { 2 };
                    assert!(matching[expected] && !matching[1], "{layer} {expert} {matching:?}");
                }
            }
        }
        let used = usage.counts();
        assert_eq!((used.precisions, used.mixed), ([Precision::Bf16, Precision::F16].into(), 0));
    });
}

#[test]
fn a_change_of_precision_is_told() {
    let eight_bits = variant(StoredDtype::Q8_0);
    runtime().block_on(async {
        let mut published = Net::start(&tiny_moe(), &["all"]).await;
        let variants = published.beside(eight_bits.path(), &["all"]).await;
        let client = client(&variants, PrecisionPolicy::Any).await;
        let peers = || client.network().unwrap().directory().peers();
        eventually("both", || peers().iter().filter(|peer| peer.address.is_some()).count() == 2).await;
        let (_, used) = tokens(&client, greedy(&PROMPT, 8)).await.unwrap();
        assert_eq!((used.precisions, used.mixed), ([Precision::Bf16].into(), 0));

        let mut generation = client.generate(greedy(&PROMPT, 400));
        for _ in 0..8 {
            generation.next().await.unwrap().unwrap();
        }
        published.volunteers.pop().unwrap().shutdown().await;
        let mut count = 8;
        while let Some(token) = generation.next().await {
            token.unwrap();
            count += 1;
        }
        let used = generation.summary().unwrap().network.clone();
        assert_eq!((count, used.precisions), (400, [Precision::Bf16, Precision::Q8_0].into()));
        assert!(used.mixed > 0);
    });
}
