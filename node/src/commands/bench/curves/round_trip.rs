//! Tokens per second against the round trip.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;

use super::Measured;
use super::curve::{Axis, Curve, Rounds, Scale};
use super::law;
use super::net::{Net, PROMPT, Setup, decode};
use super::record;

const ROUND_TRIPS_MS: [f64; 7] = [0.0, 5.0, 10.0, 20.0, 40.0, 70.0, 100.0];

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    let prompt = || vec![setup.prompt(0, PROMPT)];
    let passes = setup.record_decoding(prompt(), setup.max_tokens.min(32)).await?;
    let mut rounds = Rounds::default();
    for round in 0..setup.rounds {
        net.path(setup, 0.0, 0.0).await?;
        let served_ms = record::median_ms(&net.replay(&passes).await?);
        let trunk_ms = setup.trunk_ms(prompt(), setup.max_tokens, &passes).await?;
        for round_trip_ms in ROUND_TRIPS_MS {
            setup.bar.set_message(format!("round trip: round {round}, {round_trip_ms} ms"));
            net.path(setup, round_trip_ms, 0.0).await?;
            let law_ms = law::step(trunk_ms, served_ms, setup.layers(), round_trip_ms);
            let decoded = decode(&net.client, prompt(), setup.tokens_for(law_ms)).await?;
            rounds.add(round_trip_ms, decoded.tokens_per_second, 1e3 / law_ms);
            rounds.explain(round_trip_ms, decoded.parts(trunk_ms, law_ms - trunk_ms));
        }
    }
    net.stop().await;
    Ok(Measured::curve(Curve {
        name: "round-trip",
        title: "Tokens per second and round trip",
        x: Axis::linear("round trip, ms"),
        y: Axis { label: "tokens/s", scale: Scale::Log10 },
        series: vec![rounds.series("")],
    }))
}
