//! Tokens per second against the number of peers and of replicas: how many calls a layer makes, and what waiting for all of them costs.

use std::time::Duration;

use hanse_node::testnet::split;
use hanse_protocol::WireDtype;
use hanse_router::stats::quantile_of;

use super::Measured;
use super::curve::{Axis, Curve, Rounds, Scale};
use super::law;
use super::net::{Net, PROMPT, Setup, decode};
use super::record;

pub(super) const PEERS: [usize; 5] = [1, 2, 4, 8, 16];
const REPLICAS: [usize; 3] = [1, 2, 4];
/// Volunteers among whom there are replicas.
const AMONG: usize = 4;
const ROUND_TRIPS_MS: [f64; 2] = [0.0, 20.0];

pub(super) async fn peers(setup: &Setup) -> anyhow::Result<Measured> {
    let nets = PEERS.map(|peers| (peers, split(&setup.layout, peers, 1)));
    // With two volunteers some rows need one of them and some both.
    let series = run(setup, nets.to_vec(), 1, "peers").await?;
    Ok(Measured::curve(Curve {
        name: "peers",
        title: "Tokens per second and peers",
        x: Axis { label: "peers that share the experts", scale: Scale::Log2 },
        y: Axis { label: "tokens/s", scale: Scale::Log10 },
        series,
    }))
}

pub(super) async fn replicas(setup: &Setup) -> anyhow::Result<Measured> {
    let nets = REPLICAS.map(|replicas| (replicas, split(&setup.layout, AMONG, replicas)));
    let series = run(setup, nets.to_vec(), 0, "replicas").await?;
    Ok(Measured::curve(Curve {
        name: "replicas",
        title: "Tokens per second and replicas, four peers",
        x: Axis { label: "replicas of each expert", scale: Scale::Log2 },
        y: Axis { label: "tokens/s", scale: Scale::Log10 },
        series,
    }))
}

/// All networks run at the same time and are measured in turns. What layers with one and with several calls take is measured on the one at
/// `terms`, without delay; how many calls the layers of the others make follows from who hosts what.
async fn run(
    setup: &Setup,
    places: Vec<(usize, Vec<String>)>,
    terms: usize,
    what: &str,
) -> anyhow::Result<Vec<super::curve::Series>> {
    let prompt = || vec![setup.prompt(0, PROMPT)];
    let passes = setup.record_decoding(prompt(), setup.max_tokens.min(32)).await?;
    let mut nets = Vec::new();
    for (x, specs) in places {
        nets.push((x as f64, Net::start(setup, specs, WireDtype::F32).await?));
    }
    let mut rounds = ROUND_TRIPS_MS.map(|_| Rounds::default());
    let mut own = Rounds::default();
    for round in 0..setup.rounds {
        let (_, net) = nets.get_mut(terms).ok_or_else(|| anyhow::anyhow!("no network to measure terms on"))?;
        net.path(setup, 0.0, 0.0).await?;
        let asked = net.shares(&passes);
        let layer_ms = by_calls(&asked, &net.replay(&passes).await?);
        let trunk_ms = setup.trunk_ms(prompt(), setup.max_tokens, &passes).await?;
        for (round_trip_ms, rounds) in ROUND_TRIPS_MS.into_iter().zip(&mut rounds) {
            for (x, net) in &mut nets {
                setup.bar.set_message(format!("{what}: round {round}, {x}, {round_trip_ms} ms"));
                net.path(setup, round_trip_ms, 0.0).await?;
                let served = |layers: &Vec<Vec<usize>>| layers.iter().map(|shares| layer_ms(shares.len())).sum::<f64>();
                let served_ms = net.shares(&passes).iter().map(served).sum::<f64>() / passes.len().max(1) as f64;
                let law_ms = law::step(trunk_ms, served_ms, setup.layers(), round_trip_ms);
                let decoded = decode(&net.client, prompt(), setup.tokens_for(law_ms)).await?;
                rounds.add(*x, decoded.tokens_per_second, 1e3 / law_ms);
                rounds.explain(*x, decoded.parts(trunk_ms, law_ms - trunk_ms));
                if round_trip_ms == 0.0 {
                    // With what calls of the same rows take on this very network.
                    let law_ms =
                        law::step(trunk_ms, record::median_ms(&net.replay(&passes).await?), setup.layers(), 0.0);
                    own.add(*x, decoded.tokens_per_second, 1e3 / law_ms);
                    own.explain(*x, decoded.parts(trunk_ms, law_ms - trunk_ms));
                }
            }
        }
    }
    for (_, net) in nets {
        net.stop().await;
    }
    let series = ROUND_TRIPS_MS.iter().zip(&rounds).map(|(ms, rounds)| rounds.series(format!("{ms} ms")));
    Ok(series.chain([own.series("0 ms, calls timed there")]).collect())
}

/// What a layer takes by the number of its calls, in milliseconds: the median of those that made so many, or the nearest fewer.
fn by_calls(asked: &[Vec<Vec<usize>>], took: &[Vec<Duration>]) -> impl Fn(usize) -> f64 + use<> {
    let pairs = || asked.iter().flatten().map(Vec::len).zip(took.iter().flatten());
    let most = pairs().map(|(calls, _)| calls).max().unwrap_or(0);
    let mean = |calls: usize| {
        let times: Vec<f64> =
            pairs().filter(|(made, _)| *made == calls).map(|(_, time)| time.as_secs_f64() * 1e3).collect();
        (!times.is_empty()).then(|| quantile_of(times, 0.5))
    };
    let means: Vec<Option<f64>> = (0..=most).map(mean).collect();
    move |calls| means.iter().take(calls + 1).rev().flatten().next().copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_more_calls_than_were_timed_count_as_those_with_most() {
        let ms = Duration::from_millis;
        let asked = vec![vec![vec![2], vec![1, 1]], vec![vec![2], vec![1, 1]]];
        let layer = by_calls(&asked, &[vec![ms(2), ms(4)], vec![ms(2), ms(4)]]);
        assert_eq!([0, 1, 2, 3].map(layer), [0.0, 2.0, 4.0, 4.0]);
    }
}
