//! Tokens per second against loss, over a round trip of 20 ms.

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;
use hanse_router::stats::quantile_of;

use super::Measured;
use super::curve::{Axis, Curve, Rounds};
use super::law::{self, Chance, Path};
use super::net::{Net, PROMPT, Setup, decode};
use super::record::{self, Pass};

const ROUND_TRIP_MS: f64 = 20.0;
/// Of the packets, in each direction.
const LOSS_PERCENT: [f64; 5] = [0.0, 0.5, 1.0, 2.0, MOST_PERCENT];
const MOST_PERCENT: f64 = 5.0;
/// A layer that took so much longer than others has waited for a probe.
const LATE_MS: f64 = 1.5 * ROUND_TRIP_MS;
/// What is rare takes longer to measure.
const TIMES_AS_LONG: f64 = 4.0;
/// Bytes of a stream in a packet of 1452 bytes, which is the most that quinn sends: less the headers of packet and frame, and the tag.
const PAYLOAD: usize = 1452 - 40;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    let mut net = Net::start(setup, split(&setup.layout, setup.nodes, 1), WireDtype::F32).await?;
    let prompt = || vec![setup.prompt(0, PROMPT)];
    let passes = setup.record_decoding(prompt(), setup.max_tokens.min(32)).await?;
    let mut rounds = Rounds::default();
    let (mut late, mut all, mut expected) = (Vec::new(), 0, 0.0);
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
            if percent == MOST_PERCENT {
                let took = net.replay(&passes).await?;
                let layers: Vec<f64> = took.iter().flatten().map(|time| time.as_secs_f64() * 1e3).collect();
                let usual_ms = quantile_of(layers.clone(), 0.5);
                all += layers.len();
                // More than what the acknowledgement of a later packet tells.
                late.extend(layers.into_iter().map(|ms| ms - usual_ms).filter(|more_ms| *more_ms > LATE_MS));
                expected = chances(setup, &net, &passes, path).map(|chance| chance.over(LATE_MS)).sum::<f64>();
                expected /= (passes.len() * setup.layers()).max(1) as f64;
            }
        }
    }
    let path = Path { round_trip_ms: ROUND_TRIP_MS, loss: MOST_PERCENT / 100.0 };
    let quantile = |quantile| quantile_of(late.clone(), quantile);
    let note = format!(
        "With {MOST_PERCENT} % loss {:.1} % of {all} layers were late, by {:.1} ms (median; a quarter by at most {:.1}, three quarters by \
         at most {:.1}); by the law {:.1} %, by {:.1} ms if one packet is lost.",
        late.len() as f64 * 100.0 / all.max(1) as f64,
        quantile(0.5),
        quantile(0.25),
        quantile(0.75),
        expected * 100.0,
        path.tail_ms()
    );
    net.stop().await;
    let curve = Curve {
        name: "loss",
        title: "Tokens per second and loss, over 20 ms",
        x: Axis::linear("packets lost in each direction, %"),
        y: Axis::linear("tokens/s"),
        series: vec![rounds.series("")],
    };
    Ok(Measured { curves: vec![curve], notes: vec![note], goals: Vec::new() })
}

/// What loss adds to each layer of each pass: the latest of its calls is waited for.
fn chances(setup: &Setup, net: &Net, passes: &[Pass], path: Path) -> impl Iterator<Item = Chance> {
    let row_bytes = WireDtype::F32.row_bytes(setup.layout.hidden_size as usize);
    let call = move |experts: &usize| {
        let (sent, received) = law::call_bytes(*experts, row_bytes);
        path.call(law::packets(sent, PAYLOAD), law::packets(received, PAYLOAD))
    };
    let latest = move |shares: Vec<usize>| shares.iter().map(call).fold(Chance::none(), |all, one| all.beside(&one));
    net.shares(passes).into_iter().flatten().map(latest)
}

/// The same of a pass, on average.
fn lost_ms(setup: &Setup, net: &Net, passes: &[Pass], path: Path) -> f64 {
    chances(setup, net, passes, path).map(|chance| chance.mean()).sum::<f64>() / passes.len().max(1) as f64
}
