//! Shows what a network's members host, and tells every change: who comes, who goes, who moves, who pauses.
//!
//! Start a volunteer (`cargo run --release -- node --model examples/models/tiny-moe`), then, with an address it prints:
//!
//! ```text
//! cargo run --release -p hanse-examples --bin watch_network -- ADDRESS
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig};
use hanse_protocol::{Advert, Identity, ModelId, PeerId};
use hanse_router::network::hosted_models;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bootstrap = std::env::args().nth(1).context("usage: watch_network BOOTSTRAP_ADDRESS")?.parse()?;

    // A member that listens nowhere is a client: it looks, and nobody counts on it.
    let config = DiscoveryConfig { bootstrap: vec![bootstrap], ..DiscoveryConfig::default() };
    let discovery = Discovery::start(&Identity::generate(), config).await?;
    discovery.wait_connected(Duration::from_secs(10)).await?;

    let mut known = BTreeMap::new();
    loop {
        // An advert comes from the peer itself and is signed by it; the DHT only names the peers.
        let mut found: BTreeMap<(PeerId, ModelId), Advert> = BTreeMap::new();
        for (model, adverts) in hosted_models(&discovery).await {
            found.extend(adverts.into_iter().map(|(peer, advert)| ((peer, model), advert)));
        }
        for ((peer, model), advert) in &found {
            match known.get(&(*peer, *model)) {
                None => println!("+ {peer} hosts {} experts of {model}", advert.hosted.count()),
                Some(before) => tell_changes(peer, before, advert),
            }
        }
        for (peer, model) in known.keys().filter(|key| !found.contains_key(key)) {
            println!("- {peer} hosts nothing of {model} any more");
        }
        known = found;
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
    discovery.shutdown().await;
    Ok(())
}

fn tell_changes(peer: &PeerId, before: &Advert, now: &Advert) {
    if before.hosted != now.hosted {
        println!("~ {peer} hosts {} experts now, {} before", now.hosted.count(), before.hosted.count());
    }
    if before.draining != now.draining {
        match now.draining {
            Some(why) => println!("~ {peer} takes no calls: {why}"),
            None => println!("~ {peer} takes calls again"),
        }
    }
    if before.load_permille != now.load_permille {
        println!("~ {peer} is {} % full", now.load_permille / 10);
    }
}
