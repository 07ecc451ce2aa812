//! Tokens per second of many sequences, over a round trip of 20 ms.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;

use super::Measured;
use super::curve::{Axis, Curve, Goal, Rounds, Scale};
use super::law;
use super::net::{Net, Setup, decode};
use super::record;

const ROUND_TRIP_MS: f64 = 20.0;
const SEQUENCES: [usize; 5] = [1, 4, 16, 32, 64];
/// Short, so that all prompts together go through in few passes.
const PROMPT: usize = 4;
/// Recorded passes, each of as many rows as there are sequences.
const PASSES: usize = 8;
/// Of as many times one sequence's speed as there are sequences, at 16; and more at 64.
const WANTED: f64 = 0.8;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    let prompts = |sequences| (0..sequences).map(|number| setup.prompt(number, PROMPT)).collect::<Vec<_>>();
    let mut recorded = Vec::new();
    for sequences in SEQUENCES {
        recorded.push(setup.record_decoding(prompts(sequences), PASSES).await?);
    }
    let mut rounds = Rounds::default();
    for round in 0..setup.rounds {
        setup.bar.set_message(format!("batch: round {round}, terms"));
        net.path(setup, 0.0, 0.0).await?;
        let mut laws = Vec::new();
        for (sequences, passes) in SEQUENCES.into_iter().zip(&recorded) {
            let served_ms = record::median_ms(&net.replay(passes).await?);
            let trunk_ms = setup.trunk_ms(prompts(sequences), setup.max_tokens, passes).await?;
            laws.push((trunk_ms, law::step(trunk_ms, served_ms, setup.layers(), ROUND_TRIP_MS)));
        }
        net.path(setup, ROUND_TRIP_MS, 0.0).await?;
        for (sequences, (trunk_ms, law_ms)) in SEQUENCES.into_iter().zip(laws) {
            setup.bar.set_message(format!("batch: round {round}, {sequences} sequences"));
            let tokens = setup.tokens_for(law_ms / 2.0);
            let decoded = decode(&net.client, prompts(sequences), tokens).await?;
            rounds.add(sequences as f64, decoded.tokens_per_second, sequences as f64 * 1e3 / law_ms);
            rounds.explain(sequences as f64, decoded.parts(trunk_ms, law_ms - trunk_ms));
        }
    }
    net.stop().await;
    let series = rounds.series("");
    let speed =
        |sequences: f64| series.points.iter().find(|point| point.x == sequences).map_or(0.0, |point| point.median);
    let times = |sequences: f64| speed(sequences) / speed(1.0);
    let goal = |sequences: f64, wanted| Goal {
        what: format!("{sequences} sequences over 20 ms, times the speed of one"),
        measured: times(sequences),
        wanted,
        at_most: false,
    };
    let goals = vec![goal(16.0, WANTED * 16.0), goal(64.0, times(16.0))];
    let curve = Curve {
        name: "batch",
        title: "Tokens per second of sequences that advance together, over 20 ms",
        x: Axis { label: "sequences", scale: Scale::Log2 },
        y: Axis { label: "tokens/s of all", scale: Scale::Log10 },
        series: vec![series],
    };
    Ok(Measured { curves: vec![curve], notes: Vec::new(), goals })
}
