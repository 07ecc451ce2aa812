//! Bytes per token against the number of peers, by wire dtype.

use hanse_node::testnet::split;
use hanse_protocol::{Combine, WireDtype};

use super::Measured;
use super::curve::{Axis, Curve, Rounds, Scale};
use super::law::{self, Rows};
use super::net::{Net, Setup, decode};
use super::spread::PEERS;

const WIRES: [WireDtype; 3] = [WireDtype::F32, WireDtype::F16, WireDtype::Int8];
const KIB: f64 = 1024.0;

pub(super) async fn run(setup: &Setup) -> anyhow::Result<Measured> {
    // Of one token, so that the pass over the prompt costs what a step does.
    let prompt = || vec![setup.prompt(0, 1)];
    let tokens = setup.max_tokens;
    let passes = setup.record_decoding(prompt(), tokens - 1).await?;
    let mut counted = Rounds::default();
    let mut datagrams = WIRES.map(|_| Rounds::default());
    for peers in PEERS {
        let net = Net::start(setup, split(&setup.layout, peers, 1), WireDtype::F32).await?;
        let shares = net.shares(&passes);
        for (wire, datagrams) in WIRES.into_iter().zip(&mut datagrams) {
            let rows = Rows {
                bytes: wire.row_bytes(setup.layout.hidden_size as usize),
                client_adds: wire.default_combine() == Combine::Client,
            };
            let bytes = shares.iter().flatten().map(|shares| law::layer_bytes(shares, rows));
            let (all, told) = bytes.fold((0, 0), |(all, told), (a, b)| (all + a, told + b));
            let by_token = |bytes: usize| bytes as f64 / passes.len().max(1) as f64 / KIB;
            let client = Net::join(setup, &net.testnet, wire).await?;
            for round in 0..setup.rounds {
                setup.bar.set_message(format!("bytes: {peers} peers, {wire}, round {round}"));
                let before = net.datagram_bytes();
                let decoded = decode(&client, prompt(), tokens).await?;
                let sent = (net.datagram_bytes() - before) as f64 / tokens as f64 / KIB;
                datagrams.add(peers as f64, sent, by_token(all));
                if wire == WireDtype::F32 {
                    counted.add(peers as f64, decoded.counted_bytes / KIB, by_token(told));
                }
            }
            client.close().await;
        }
        net.stop().await;
    }
    let of_wire = WIRES.iter().zip(&datagrams).map(|(wire, rounds)| rounds.series(format!("{wire}, in datagrams")));
    Ok(Measured::curve(Curve {
        name: "bytes",
        title: "Bytes per token and peers, sent and received",
        x: Axis { label: "peers that share the experts", scale: Scale::Log2 },
        y: Axis::linear("KiB a token"),
        series: [counted.series("f32, counted")].into_iter().chain(of_wire).collect(),
    }))
}
