//! A model that is nowhere but on the network: manifest, trunk and experts come from volunteers.

use hanse_model::Checkpoint;
use hanse_node::{Hosting, Volunteer};
use hanse_protocol::{Frame, Identity, ModelId, SignedManifest};
use hanse_router::weights::describe::{open_described, read_manifest};
use hanse_router::weights::{Cache, DescribeError, Fetcher, Peers, RemoteModel, describe};
use hanse_router::{Client, NetworkConfig};
use hanse_tests::givers::{find, founder, founder_of, joins, member, newcomer, room_for};
use hanse_tests::net::{changed_copy, eventually, greedy, model_config, replicas, runtime, tokens};
use hanse_tests::reference::{fixture, tiny_moe};
use hanse_tests::stranger::{Stranger, bytes_of, call_of};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROMPT: [u32; 3] = [317, 577, 745];

#[test]
fn a_client_with_an_empty_cache_gives_the_tokens_of_one_process() {
    runtime().block_on(async {
        let (volunteer, id) = founder("all").await;
        let (network, cache) = (joins(&volunteer), tempfile::tempdir().unwrap());
        let local = Client::local(&model_config(&tiny_moe())).unwrap();
        let (expected, _) = tokens(&local, greedy(&PROMPT, 24)).await.unwrap();
        let mut read = Vec::new();
        for _ in 0..2 {
            let model = find(id, cache.path(), &network).await;
            model.fetch_trunk(&|_, _| {}).await.unwrap();
            let client =
                Client::connect_with(model.checkpoint(), 1, id, &Identity::generate(), network.clone()).await.unwrap();
            assert_eq!(tokens(&client, greedy(&PROMPT, 24)).await.unwrap().0, expected);
            assert!(client.tokenizer().is_some(), "it came with the trunk");
            read.push((model.fetcher().bytes(), model.manifest().manifest().trunk_bytes()));
            client.close().await;
            model.close().await;
        }
        assert!(read[0].0 > read[0].1 && read[1].0 == 0, "the second time all is in the cache: {read:?}");
    });
}

#[test]
fn a_volunteer_with_an_empty_cache_reads_what_it_hosts_and_gives_it_on() {
    runtime().block_on(async {
        let (first, id) = founder("0-2:0-15").await;
        let (network, cache) = (joins(&first), tempfile::tempdir().unwrap());
        let model = find(id, cache.path(), &network).await;
        let mut second = newcomer(&model, &network, Hosting::Experts("3-5:0-15".parse().unwrap())).await;
        second.loaded().await.unwrap();
        let (read, hosts) = (model.fetcher().bytes(), second.store().bytes());
        assert!(read >= hosts && read <= hosts + hosts / 20, "{read} bytes read to host {hosts}");

        let third = tempfile::tempdir().unwrap();
        let other = find(id, third.path(), &network).await;
        other.fetch_trunk(&|_, _| {}).await.unwrap();
        let client =
            Client::connect_with(other.checkpoint(), 1, id, &Identity::generate(), network.clone()).await.unwrap();
        let local = Client::local(&model_config(&tiny_moe())).unwrap();
        let (expected, _) = tokens(&local, greedy(&PROMPT, 16)).await.unwrap();
        assert_eq!(tokens(&client, greedy(&PROMPT, 16)).await.unwrap().0, expected);

        // With the founder gone, an expert still comes from the one that hosts it.
        let peers = other.fetcher().peers().unwrap().clone();
        let what = hanse_router::weights::What::Expert { layer: 4, expert: 7 };
        let item = hanse_router::weights::Item::find(other.manifest().manifest(), what).unwrap();
        eventually("both give out weights", || peers.sources(&item).len() == 2).await;
        first.shutdown().await;
        other.fetcher().fetch(&item).await.unwrap();
        assert!(other.fetcher().cache().has(&item.blob));
    });
}

/// Experts of gpt-oss have biases, and lie in its files with their inputs first.
#[test]
fn experts_with_biases_are_fetched_one_by_one_and_give_the_tokens_of_one_process() {
    runtime().block_on(async {
        let dir = fixture("gpt_oss");
        let (first, id) = founder_of(&dir, "0-3:0-3").await;
        let (network, cache) = (joins(&first), tempfile::tempdir().unwrap());
        let model = find(id, cache.path(), &network).await;
        let mut second = newcomer(&model, &network, Hosting::Experts("0-3:3-5".parse().unwrap())).await;
        second.loaded().await.unwrap();
        let (read, hosts) = (model.fetcher().bytes(), second.store().bytes());
        assert!(
            (hosts..hosts + hosts / 10).contains(&read),
            "its experts and a manifest: {read} bytes to host {hosts}"
        );
        let third = tempfile::tempdir().unwrap();
        let other = find(id, third.path(), &network).await;
        other.fetch_trunk(&|_, _| {}).await.unwrap();
        let client =
            Client::connect_with(other.checkpoint(), 2, id, &Identity::generate(), network.clone()).await.unwrap();
        let local = Client::local(&model_config(&dir)).unwrap();
        let (expected, _) = tokens(&local, greedy(&[3, 141, 59], 24)).await.unwrap();
        assert_eq!(tokens(&client, greedy(&[3, 141, 59], 24)).await.unwrap().0, expected);
    });
}

#[test]
fn no_manifest_is_made_of_weights_that_are_no_numbers() {
    let changed = changed_copy(&fixture("gpt_oss"));
    let path = changed.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (length, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    // Value 2 of the up biases of expert 3, which is number 48 * 3 + 5 of the tensor.
    let name = "model.layers.1.mlp.experts.gate_up_proj_bias";
    let at = 8 + length + metadata.info(name).unwrap().data_offsets.0 + 4 * (48 * 3 + 5);
    bytes[at..at + 4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = describe(&Checkpoint::open(changed.path()).unwrap(), &mut |_, _| {}).unwrap_err().to_string();
    // After the 32 x 48 values before it.
    assert!(error.contains("expert 3 of layer 1 has -inf at place 1541"), "{error}");
}

#[test]
fn a_volunteer_with_an_empty_cache_serves_its_first_expert_within_ten_seconds() {
    runtime().block_on(async {
        let (first, id) = founder("0-5:0-7").await;
        let network = joins(&first);
        let mut others = Vec::new();
        for experts in ["0-5:8-15", "0-2:0-15"] {
            others.push(member(Hosting::Experts(experts.parse().unwrap()), network.bootstrap.clone()).await.0);
        }
        let cache = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let model = find(id, cache.path(), &network).await;
        let mut joined = newcomer(&model, &network, room_for(32)).await;
        eventually("it holds an expert", || !joined.store().is_empty()).await;
        let held = began.elapsed();
        let (layer, expert) = joined.store().hosted().unwrap().iter().next().unwrap();
        let stranger = Stranger::dial(joined.peer_id(), joined.data_addresses()[0]).await;
        let answer =
            stranger.send(&bytes_of(&Frame::Call(call_of(&tiny_moe(), id, layer, expert))).await).await.unwrap();
        let served = began.elapsed();
        assert!(matches!(answer, Frame::Answer(_)), "{answer:?}");
        joined.loaded().await.unwrap();
        println!("holds an expert after {held:?}, serves it after {served:?}, all 32 after {:?}", began.elapsed());
        assert!(served < Duration::from_secs(10), "{served:?}");
        let (read, hosts) = (model.fetcher().bytes(), joined.store().bytes());
        let manifest = model.manifest().encode().len() as u64;
        println!(
            "{read} bytes read to host {hosts}, of a manifest of {manifest}: {:?}",
            model.fetcher().bytes_by_source()
        );
        assert_eq!(joined.store().len(), 32);
        assert!(read >= hosts && read <= hosts + manifest + hosts / 20, "{read} bytes read to host {hosts}");
    });
}

#[test]
fn after_one_of_four_has_left_those_without_a_folder_fetch_what_two_replicas_need() {
    runtime().block_on(async {
        // Four times 64 places for 96 experts; three times 64 are exactly two replicas of each.
        let (founder, id) = member(room_for(64), Vec::new()).await;
        let network = joins(&founder);
        let caches = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let (mut models, mut volunteers) = (Vec::new(), vec![founder]);
        for cache in &caches {
            let model = find(id, cache.path(), &network).await;
            let mut joined = newcomer(&model, &network, room_for(64)).await;
            joined.loaded().await.unwrap();
            models.push(model);
            volunteers.push(joined);
        }
        eventually("two replicas of each", || replicas(&tiny_moe(), &volunteers).0 >= 2).await;
        let fetched = || models.iter().map(|model| model.fetcher().bytes()).sum::<u64>();
        let cached = || caches.iter().map(|cache| std::fs::read_dir(cache.path().join("blobs")).unwrap().count()).sum();
        let moved = |volunteers: &[Volunteer]| volunteers.iter().map(|v| v.moves().taken).sum::<u64>();
        let one = volunteers[0].store().bytes() / 64;
        // The first of those that joined: with the last one gone everything would be as before it came.
        let leaves = volunteers.remove(1);
        let (moves_before, bytes_before, cached_before): (u64, u64, usize) = (moved(&volunteers), fetched(), cached());
        leaves.shutdown().await;
        let left = Instant::now();
        eventually("two replicas of each again", || replicas(&tiny_moe(), &volunteers) == (2, 2)).await;
        let took = left.elapsed();
        // Somebody may still fetch for a move that will be called off.
        let mut read = 0;
        while std::mem::replace(&mut read, fetched()) != read {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let moves = moved(&volunteers) - moves_before;
        let (bytes, new) = (fetched() - bytes_before, cached() - cached_before);
        println!(
            "again two replicas of each after {took:?}: {moves} experts moved, {new} of them fetched, {bytes} bytes"
        );
        assert!(took < Duration::from_secs(45), "{took:?}");
        assert!(moves <= 96, "{moves} experts moved where 64 were lost");
        // What the founder moves lies in its folder, what somebody hosted before may still lie in its cache, and a move that others had
        // made meanwhile is called off after it has fetched.
        assert!(new <= 96, "{new} fetched, {moves} moved");
        assert!(bytes >= new as u64 * one && bytes <= new as u64 * one * 105 / 100, "{bytes} bytes for {new} of {one}");
    });
}

#[test]
fn a_volunteer_that_cannot_get_all_that_it_chose_serves_the_rest_and_takes_others() {
    runtime().block_on(async {
        let (founder, id) = founder("0:0").await;
        let caches = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let first = find(id, caches[0].path(), &joins(&founder)).await;
        let mut half = newcomer(&first, &joins(&founder), Hosting::Experts("0-2:0-15".parse().unwrap())).await;
        half.loaded().await.unwrap();
        founder.shutdown().await;

        let network = joins(&half);
        let peers = Arc::new(Peers::join(id, &network).await.unwrap());
        let cache = Cache::new(caches[1].path(), u64::MAX).unwrap();
        let fetcher = Fetcher::new(cache, Vec::new(), Some(peers), Duration::from_secs(2));
        let model = RemoteModel::new(first.manifest().clone(), Arc::new(fetcher)).unwrap();
        // Of 56 it chooses the 48 that nobody hosts first, and gets none of them.
        let mut chooses = newcomer(&model, &network, room_for(56)).await;
        chooses.loaded().await.unwrap();
        assert_eq!(chooses.store().len(), 8);
        // It does not go on to wish for what is not to be had, but takes what is.
        eventually("it takes others", || chooses.moves().taken >= 4).await;
        assert!(chooses.store().hosted().unwrap().iter().all(|(layer, _)| layer < 3));

        // What was asked for by name and is not to be had is an error.
        let mut named = newcomer(&model, &network, Hosting::Experts("2-3:0-15".parse().unwrap())).await;
        let error = named.loaded().await.unwrap_err().to_string();
        assert!(error.contains("of layer 3 cannot be fetched: no source has it"), "{error}");
    });
}

#[test]
fn a_model_that_nobody_has_is_said_to_be_so() {
    runtime().block_on(async {
        let (volunteer, _) = founder("all").await;
        let network = NetworkConfig { join_timeout: std::time::Duration::from_secs(1), ..joins(&volunteer) };
        let cache = tempfile::tempdir().unwrap();
        let unknown = ModelId([7; 32]);
        let found = RemoteModel::find(unknown, Cache::new(cache.path(), u64::MAX).unwrap(), &network, &[]).await;
        let error = found.unwrap_err().to_string();
        assert!(error.contains("no peer gives out model 0707"), "{error}");
    });
}

#[test]
fn a_folder_is_compared_with_its_manifest_as_it_is_loaded() {
    let changed = changed_copy(&tiny_moe());
    let described = describe(&Checkpoint::open(&tiny_moe()).unwrap(), &mut |_, _| {}).unwrap();
    let signed = SignedManifest::sign(described.manifest, &Identity::generate()).unwrap();
    let path = changed.path().join("hanse-manifest.json");
    std::fs::write(&path, signed.to_json(&described.locations)).unwrap();
    let (read, _) = read_manifest(changed.path()).unwrap().unwrap();
    assert_eq!(read, signed);
    let checkpoint = open_described(changed.path(), read.manifest()).unwrap();
    let error = Client::local_with(&checkpoint, 1).unwrap_err().to_string();
    assert!(error.contains("`model.norm.weight` is not the one of the manifest"), "{error}");
    // What is not changed can be used.
    hanse_model::Expert::load(&checkpoint, 0, 0).unwrap();

    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"family\":\"", "\"family\":\"x")).unwrap();
    let error = read_manifest(changed.path()).unwrap_err();
    assert!(
        matches!(error, DescribeError::Manifest { .. }) && error.to_string().contains("signature is wrong"),
        "{error}"
    );
}

#[test]
fn a_copy_with_one_weight_changed_has_another_id() {
    let id = |dir: &std::path::Path| hanse_router::weights::model_id(&Checkpoint::open(dir).unwrap()).unwrap();
    assert_ne!(id(&tiny_moe()), id(changed_copy(&tiny_moe()).path()));
}
