//! Tokens per second against loss, over a round trip of 20 ms.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;

use super::Measured;
use super::curve::{Axis, Curve, Rounds};
use super::law::{self, Chance, Path};
use super::net::{Net, PROMPT, Setup, decode};
use super::record::{self, Pass};

const ROUND_TRIP_MS: f64 = 20.0;
/// Of the packets, in each direction.
const LOSS_PERCENT: [f64; 5] = [0.0, 0.5, 1.0, 2.0, 5.0];
/// What is rare takes longer to measure.
const TIMES_AS_LONG: f64 = 4.0;
/// Bytes of a stream in a packet of 1452 bytes, which is the most that quinn sends: less the headers of packet and frame, and the tag.
const PAYLOAD: usize = 1452 - 40;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    let prompt = || vec![setup.prompt(0, PROMPT)];
    let passes = setup.record_decoding(prompt(), setup.max_tokens.min(32)).await?;
    let mut rounds = Rounds::default();
    for round in 0..setup.rounds {
        net.path(setup, 0.0, 0.0).await?;
        let served_ms = record::median_ms(&net.replay(&passes).await?);
        let trunk_ms = setup.trunk_ms(prompt(), setup.max_tokens, &passes).await?;
        let base_ms = law::step(trunk_ms, served_ms, setup.layers(), ROUND_TRIP_MS);
        for percent in LOSS_PERCENT {
            setup.bar.set_message(format!("loss: round {round}, {percent} %"));
            let path = Path { round_trip_ms: ROUND_TRIP_MS, loss: percent / 100.0 };
            net.path(setup, ROUND_TRIP_MS, path.loss).await?;
            let law_ms = base_ms + lost_ms(setup, &net, &passes, path);
            let decoded = decode(&net.client, prompt(), setup.tokens_for(law_ms / TIMES_AS_LONG)).await?;
            // The mean: what is lost is rare, and costs much.
            rounds.add(percent, decoded.mean_tokens_per_second, 1e3 / law_ms);
        }
    }
    net.stop().await;
    Ok(Measured::curve(Curve {
        name: "loss",
        title: "Tokens per second and loss, over 20 ms",
        x: Axis::linear("packets lost in each direction, %"),
        y: Axis::linear("tokens/s"),
        series: vec![rounds.series("")],
    }))
}

/// What loss adds to a pass on average: in each layer the latest of its calls is waited for.
fn lost_ms(setup: &Setup, net: &Net, passes: &[Pass], path: Path) -> f64 {
    let row_bytes = WireDtype::F32.row_bytes(setup.layout.hidden_size as usize);
    let call = |experts: &usize| {
        let (sent, received) = law::call_bytes(*experts, row_bytes);
        path.call(law::packets(sent, PAYLOAD), law::packets(received, PAYLOAD))
    };
    let layers = net.shares(passes);
    let latest = |shares: &Vec<usize>| shares.iter().map(call).fold(Chance::none(), |all, one| all.beside(&one)).mean();
    layers.iter().flatten().map(latest).sum::<f64>() / passes.len().max(1) as f64
}
