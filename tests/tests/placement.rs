//! Volunteers that choose what to host, move it when others come and go, pause and resume.

use std::time::{Duration, Instant};

use futures::StreamExt;
use hanse_model::Routing;
use hanse_protocol::Draining;
use hanse_router::{Client, Usage};
use hanse_tests::net::{Net, eventually, greedy, model_config, runtime, tokens};
use hanse_tests::reference::tiny_moe;

const PROMPT: [u32; 13] = [707, 625, 259, 466, 12, 425, 299, 259, 469, 1714, 696, 1423, 14];

#[test]
fn after_one_of_four_has_left_every_expert_has_two_replicas_again() {
    runtime().block_on(async {
        let mut net = Net::start(&tiny_moe(), &[]).await;
        // Four times 64 places for 96 experts; three times 64 are exactly two replicas of each.
        for _ in 0..4 {
            let volunteer = net.with_memory(64).await;
            net.volunteers.push(volunteer);
        }
        eventually("two replicas of each", || net.replicas().0 >= 2).await;
        let before: u64 = net.volunteers.iter().map(|volunteer| volunteer.moves().taken).sum();
        let left = Instant::now();
        net.volunteers.remove(1).shutdown().await;
        eventually("two replicas of each again", || net.replicas() == (2, 2)).await;
        let took = left.elapsed();
        let hosted = || net.volunteers.iter().map(|v| v.store().hosted().unwrap()).collect::<Vec<_>>();
        let settled = hosted();
        // Several looks later nothing more has moved.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(hosted(), settled, "nothing moves without a gain");
        let moves = net.volunteers.iter().map(|volunteer| volunteer.moves().taken).sum::<u64>() - before;
        println!("again two replicas of each after {took:?}, {moves} experts moved");
        assert!(moves <= 96, "{moves} experts moved where 64 were lost");
    });
}

#[test]
fn two_that_join_at_the_same_time_take_different_experts() {
    runtime().block_on(async {
        let mut net = Net::start(&tiny_moe(), &["0-5:0-7"]).await;
        let (one, two) = tokio::join!(net.with_memory(24), net.with_memory(24));
        let (first, second) = (one.store().hosted().unwrap(), two.store().hosted().unwrap());
        assert_eq!((first.count(), second.count()), (24, 24));
        let both = first.iter().filter(|(layer, expert)| second.contains(*layer, *expert)).count();
        assert_eq!(both, 0);
        net.volunteers.extend([one, two]);
        assert_eq!(net.replicas(), (1, 1));
    });
}

#[test]
fn capacity_moves_to_what_is_wanted() {
    runtime().block_on(async {
        let mut net = Net::start(&tiny_moe(), &["all", "all"]).await;
        let third = net.with_memory(8).await;
        let client = net.client().await;
        let network = client.network().unwrap();
        // Nobody asks for anything but eight experts of a layer that the third did not choose.
        let hosted = third.store().hosted().unwrap();
        let layer = (0..6).find(|layer| hosted.in_layer(*layer).next().is_none()).unwrap();
        let experts: Vec<u32> = (0..256).flat_map(|row| [row % 4, 4 + row % 4]).collect();
        let routing = Routing { top_k: 2, weights: vec![0.5; experts.len()], experts };
        let hidden = vec![0.1; 256 * 192];
        let calls = async {
            loop {
                network.forward(layer, &hidden, &routing, &mut Usage::default()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let wanted = || (0..8).all(|expert| third.store().hosted().unwrap().contains(layer, expert));
        tokio::select! {
            () = calls => {}
            () = eventually("the third hosts what is wanted", wanted) => {}
        }
        println!("{:?}", third.moves());
        net.volunteers.push(third);
    });
}

#[test]
fn a_paused_volunteer_is_not_called_and_a_resumed_one_is_again() {
    runtime().block_on(async {
        const COUNT: usize = 48;
        let net = Net::start(&tiny_moe(), &["all", "all"]).await;
        let local = tokio::task::spawn_blocking(|| Client::local(&model_config(&tiny_moe())).unwrap()).await.unwrap();
        let expected = tokens(&local, greedy(&PROMPT, COUNT)).await.unwrap().0;
        let client = net.client().await;
        eventually("both are connected", || client.network().unwrap().directory().peers().len() == 2).await;

        let mut generation = client.generate(greedy(&PROMPT, COUNT));
        let mut found = Vec::new();
        while let Some(token) = generation.next().await {
            found.push(token.unwrap().id);
            if found.len() == COUNT / 3 {
                net.volunteers[0].pause(Draining::Asked).await.unwrap();
            }
        }
        assert_eq!(found, expected, "paused in the middle");
        let paused = net.volunteers[0].counts().pairs;
        assert_eq!(tokens(&client, greedy(&PROMPT, COUNT)).await.unwrap().0, expected);
        assert_eq!(net.volunteers[0].counts().pairs, paused, "nothing was computed while it was paused");

        net.volunteers[0].resume().await.unwrap();
        let resumed = Instant::now();
        while net.volunteers[0].counts().pairs == paused {
            assert_eq!(tokens(&client, greedy(&PROMPT, 4)).await.unwrap().0, expected[..4]);
            assert!(resumed.elapsed() < Duration::from_secs(20), "it is not used again");
        }
        println!("used again after {:?}", resumed.elapsed());
    });
}
