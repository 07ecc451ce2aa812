//! Strangers on the data plane of volunteers that serve somebody else meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hanse_protocol::{Frame, PREFIX_BYTES, Refusal, RefusalCode};
use hanse_router::Client;
use hanse_tests::net::{Net, eventually, greedy, model_config, runtime, tokens};
use hanse_tests::reference::tiny_moe;
use hanse_tests::stranger::{Stranger, bytes_of, call};

const PROMPT: [u32; 6] = [707, 625, 259, 466, 12, 425];

/// Lets `client` generate again and again while `attack` goes on, and checks every answer.
async fn served_during(net: &Net, attack: impl AsyncFnOnce(&[Stranger])) {
    let mut strangers = Vec::new();
    for volunteer in &net.volunteers {
        strangers.push(Stranger::dial(volunteer.peer_id(), volunteer.data_addresses()[0]).await);
    }
    let client = net.client().await;
    let local = tokio::task::spawn_blocking(|| Client::local(&model_config(&tiny_moe())).unwrap()).await.unwrap();
    let expected = tokens(&local, greedy(&PROMPT, 24)).await.unwrap().0;
    let over = Arc::new(AtomicBool::new(false));
    let serving = tokio::spawn({
        let (client, over) = (client.clone(), over.clone());
        async move {
            let mut answers = Vec::new();
            // At least one generation begins after the attack began, and the last one ends after it ended.
            while !over.load(Ordering::Relaxed) {
                answers.push(tokens(&client, greedy(&PROMPT, 24)).await);
            }
            answers.push(tokens(&client, greedy(&PROMPT, 24)).await);
            answers
        }
    });
    attack(&strangers).await;
    over.store(true, Ordering::Relaxed);
    let answers = serving.await.unwrap();
    assert!(answers.len() >= 2);
    for answer in answers {
        let (found, used) = answer.unwrap();
        assert_eq!(found, expected);
        assert_eq!(used.retries, 0, "no peer failed");
    }
}

/// Deterministic bytes that look like nothing.
fn noise(count: usize, mut state: u64) -> Vec<u8> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn bad_frames_are_refused_by_kind_and_disturb_nobody() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let good = bytes_of(&Frame::Call(call(&net, 0, 0))).await;
        let header_at = PREFIX_BYTES;
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            bytes
        };
        let refusal = bytes_of(&Frame::Refusal(Refusal::new(1, RefusalCode::Busy, "I refuse".to_owned()))).await;
        let cases: Vec<(&str, Vec<u8>, RefusalCode)> = vec![
            ("truncated in the prefix", good[..7].to_vec(), RefusalCode::Malformed),
            ("truncated in the header", good[..header_at + 5].to_vec(), RefusalCode::Malformed),
            ("truncated in the body", good[..good.len() - 1].to_vec(), RefusalCode::Malformed),
            ("oversized body", changed(&|b| b[12..16].fill(0xff)), RefusalCode::TooLarge),
            ("oversized header", changed(&|b| b[8..12].fill(0xff)), RefusalCode::TooLarge),
            ("another version", changed(&|b| b[4] = 99), RefusalCode::UnsupportedVersion),
            ("unknown kind", changed(&|b| b[6] = 99), RefusalCode::Malformed),
            ("another magic", changed(&|b| b[0] = b'X'), RefusalCode::Malformed),
            ("noise in the header", changed(&|b| b[header_at..].fill(0xff)), RefusalCode::Malformed),
            ("random bytes", noise(4096, 1), RefusalCode::Malformed),
            ("another protocol", b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec(), RefusalCode::Malformed),
            ("a frame that is no request", refusal, RefusalCode::Malformed),
        ];
        served_during(&net, async |strangers| {
            for stranger in strangers {
                for (what, bytes, expected) in &cases {
                    let (code, message) = stranger.refusal(bytes).await;
                    assert_eq!(code, *expected, "{what}: {message}");
                    assert!(!message.is_empty(), "{what}");
                }
                for seed in 0..50 {
                    stranger.refusal(&noise(64, seed)).await;
                }
            }
        })
        .await;
        for volunteer in &net.volunteers {
            assert_eq!(volunteer.counts().malformed, cases.len() as u64 + 50);
        }
        // The strangers' connections are not held against them: a good call is answered on them.
        let volunteer = &net.volunteers[0];
        let stranger = Stranger::dial(volunteer.peer_id(), volunteer.data_addresses()[0]).await;
        stranger.refusal(&noise(64, 7)).await;
        assert!(matches!(stranger.send(&good).await, Ok(Frame::Answer(_))));
    });
}

#[test]
fn streams_that_stall_in_a_frame_hinder_nobody() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let good = bytes_of(&Frame::Call(call(&net, 0, 0))).await;
        served_during(&net, async |strangers| {
            let mut stalled = Vec::new();
            for stranger in strangers {
                for i in 0..50 {
                    // Half a prefix, half a header, half a body.
                    let end = [PREFIX_BYTES / 2, PREFIX_BYTES + 3, good.len() - 100][i % 3];
                    stalled.push(stranger.begin(&good[..end]).await);
                }
            }
            let calls: u64 = net.volunteers.iter().map(|volunteer| volunteer.counts().calls).sum();
            let now = || net.volunteers.iter().map(|volunteer| volunteer.counts().calls).sum::<u64>();
            eventually("others are served while the streams stall", || now() > calls + 200).await;
            drop(stalled);
        })
        .await;
    });
}

#[test]
fn a_stranger_that_opens_more_streams_than_it_may_only_stops_itself() {
    runtime().block_on(async {
        let net = Net::halves(&tiny_moe()).await;
        let good = bytes_of(&Frame::Call(call(&net, 0, 0))).await;
        served_during(&net, async |strangers| {
            let mut stalled = Vec::new();
            let opening = async {
                loop {
                    stalled.push(strangers[0].begin(&good[..PREFIX_BYTES / 2]).await);
                }
            };
            // It waits for ever for one stream more than the limit.
            let _ = tokio::time::timeout(Duration::from_secs(1), opening).await;
            assert!(stalled.len() < 10_000, "{} streams were accepted", stalled.len());
        })
        .await;
    });
}
