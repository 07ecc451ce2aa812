//! Time until the first token against the length of the prompt, over a round trip of 20 ms.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;
use hanse_router::stats::quantile_of;

use super::Measured;
use super::curve::{Axis, Curve, Goal, Rounds};
use super::law;
use super::net::{Net, PROMPT, Setup, decode};
use super::record;

const ROUND_TRIP_MS: f64 = 20.0;
const PROMPTS: [usize; 5] = [32, 64, 128, 256, 512];
/// Times the round trips of one pass and computing in one process, for the longest prompt.
const WANTED: f64 = 1.3;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    // An answer needs room for a token.
    let lengths = PROMPTS.map(|tokens| tokens.min(setup.context() - 2));
    let mut rounds = Rounds::default();
    let bare = Net::bare(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    decode(&bare.client, vec![setup.prompt(0, PROMPT)], setup.max_tokens).await?;
    let mut longest = Vec::new();
    for round in 0..setup.rounds {
        // Others each time, or they would be found computed already.
        let prompts: Vec<_> =
            lengths.iter().enumerate().map(|(i, &n)| setup.prompt(100 + round * lengths.len() + i, n)).collect();
        let passes = setup.record_prompts(prompts.clone()).await?;
        net.path(setup, 0.0, 0.0).await?;
        let served = net.replay(&passes).await?;
        let experts = setup.each_experts_ms(&passes).await?;
        net.path(setup, ROUND_TRIP_MS, 0.0).await?;
        for (index, prompt) in prompts.into_iter().enumerate() {
            setup.bar.set_message(format!("prefill: round {round}, {} tokens", prompt.len()));
            let length = prompt.len() as f64;
            let here = decode(&setup.local, vec![prompt.clone()], 2).await?;
            let experts_ms = experts.get(index).copied().unwrap_or_default();
            let served_ms = record::median_ms(&served[index..=index]);
            let law_ms = law::step((here.prefill_ms - experts_ms).max(0.0), served_ms, setup.layers(), ROUND_TRIP_MS);
            let there = decode(&net.client, vec![prompt.clone()], 2).await?;
            rounds.add(length, there.prefill_ms, law_ms);
            if index + 1 == lengths.len() {
                let near = decode(&bare.client, vec![prompt], 2).await?;
                let round_trips_ms = setup.layers() as f64 * ROUND_TRIP_MS;
                let times = |computing_ms: f64| there.prefill_ms / (round_trips_ms + computing_ms);
                longest.push((times(here.prefill_ms), times(near.prefill_ms)));
            }
        }
    }
    net.stop().await;
    bare.stop().await;
    let tokens = lengths[lengths.len() - 1];
    let what = format!("a prompt of {tokens} tokens over 20 ms, times L x RTT and computing it");
    let goal = |what: &str, of: fn(&(f64, f64)) -> f64| Goal {
        what: what.to_owned(),
        measured: quantile_of(longest.iter().map(of).collect(), 0.5),
        wanted: WANTED,
        at_most: true,
    };
    let goals = vec![
        goal(&format!("{what} in one process"), |(alone, _)| *alone),
        goal(&format!("{what} over loopback"), |(_, near)| *near),
    ];
    let curve = Curve {
        name: "prefill",
        title: "Time until the first token and prompt, over 20 ms",
        x: Axis::linear("tokens in the prompt"),
        y: Axis::linear("ms until the first token"),
        series: vec![rounds.series("")],
    };
    Ok(Measured { curves: vec![curve], notes: Vec::new(), goals })
}
