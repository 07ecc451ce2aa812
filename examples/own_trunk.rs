//! The layer below `Client`: the routed experts of one layer as a function, for people who bring their own trunk.
//!
//! Nothing of the model is on this machine; its id, as `hanse node` prints it, and its sizes are all that is needed. Start a
//! volunteer (`cargo run --release -- node --model examples/models/tiny-moe`), then, with what it prints:
//!
//! ```text
//! cargo run --release -p hanse-examples --bin own_trunk -- ADDRESS MODEL_ID
//! ```

use anyhow::Context;
use hanse_model::Routing;
use hanse_protocol::Identity;
use hanse_router::{ExpertLayout, ExpertNetwork, NetworkConfig, Usage};

// The sizes of examples/models/tiny-moe.
const HIDDEN: usize = 192;
const LAYERS: u32 = 6;
const EXPERTS: u32 = 16;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().context("usage: own_trunk BOOTSTRAP_ADDRESS MODEL_ID");
    let (bootstrap, model) = (next()?.parse()?, next()?.parse()?);

    // Returns when there is a connection to a peer for every expert, and keeps that true in the background.
    let layout =
        ExpertLayout { hidden_size: HIDDEN as u32, layers: (0..LAYERS).map(|layer| (layer, EXPERTS)).collect() };
    let config = NetworkConfig { bootstrap: vec![bootstrap], ..NetworkConfig::default() };
    let network = ExpertNetwork::join(&Identity::generate(), model, layout, config).await?;
    for peer in network.directory().peers() {
        println!("{} hosts {} experts", peer.peer, peer.advert.hosted.count());
    }

    // Two rows of hidden states, as they are after the MoE block's norm, and what a gate might have said about them: two
    // experts for each row, in ascending order, with the weights of their outputs.
    let hidden: Vec<f32> = (0..2 * HIDDEN).map(|i| (i as f32 * 0.37).sin()).collect();
    let routing = Routing { top_k: 2, experts: vec![0, 5, 5, 15], weights: vec![0.75, 0.25, 0.5, 0.5] };

    // One frame per peer and layer, whatever the number of rows. Lost and late calls go to other peers meanwhile.
    let mut usage = Usage::default();
    for layer in 0..LAYERS {
        let output = network.forward(layer, &hidden, &routing, &mut usage).await?;
        for (row, values) in output.chunks_exact(HIDDEN).enumerate() {
            let size = values.iter().map(|v| v * v).sum::<f32>().sqrt();
            println!("layer {layer}, row {row}: {:?} ..., length {size:.3}", &values[..3]);
        }
    }
    println!("{:?}", usage.counts());
    network.shutdown().await;
    Ok(())
}
