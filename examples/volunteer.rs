//! A volunteer inside your own program: it hosts experts as long as the program runs.
//!
//! Without an address it is the first member of a network; with one it joins, and takes the experts that the fewest host.
//!
//! ```text
//! cargo run --release -p hanse-examples --bin volunteer -- examples/models/tiny-moe
//! cargo run --release -p hanse-examples --bin volunteer -- examples/models/tiny-moe ADDRESS
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use hanse_model::Checkpoint;
use hanse_node::{Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::Identity;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().context("usage: volunteer MODEL_DIR [BOOTSTRAP_ADDRESS]")?;
    let bootstrap = args.map(|address| address.parse()).collect::<Result<Vec<_>, _>>()?;

    // Opening maps the files; only the tensors of the experts that are hosted become memory.
    let checkpoint = Checkpoint::open(Path::new(&dir))?;
    let model = hanse_router::weights::model_id(&checkpoint)?;

    // `Identity::load_or_create` keeps the same peer id over restarts; this one lives as long as the process.
    let identity = Identity::generate();
    // The default listens on loopback. For other machines, listen on "/ip4/0.0.0.0/udp/4001/quic-v1".
    let config = VolunteerConfig { bootstrap, hosting: Hosting::MemoryBytes(8 << 20), ..VolunteerConfig::default() };
    let volunteer = Volunteer::start(&identity, &checkpoint, model, config, |_, _| {}).await?;

    println!("{} hosts {} experts ({} bytes)", volunteer.peer_id(), volunteer.store().len(), volunteer.store().bytes());
    for address in volunteer.addresses() {
        println!("others can join through {address}");
    }

    // Your own program goes here. This one reports until ctrl-C.
    let mut every = tokio::time::interval(Duration::from_secs(10));
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            _ = every.tick() => {
                let served = volunteer.counts();
                println!("{} calls answered, {} rows computed", served.calls, served.pairs);
            }
        }
    }
    // Says goodbye and finishes what is being computed. Dropping it instead would be as rude as a crash.
    volunteer.shutdown().await;
    Ok(())
}
