//! `hanse node`: volunteer.

use anyhow::Context as _;
use hanse_model::Checkpoint;
use hanse_node::{ExpertsSpec, Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::discovery::{ReachConfig, ReachPolicy};
use hanse_protocol::multiaddr::Protocol;
use hanse_protocol::{Identity, Multiaddr};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use crate::cli::NodeArgs;
use crate::{model_id, output, paths};

#[derive(Serialize)]
struct Ready {
    peer_id: String,
    addresses: Vec<String>,
    data_addresses: Vec<String>,
    data_listen: String,
    reachability: String,
    experts: usize,
    expert_bytes: u64,
    model_id: String,
}

pub(crate) async fn run(args: NodeArgs) -> anyhow::Result<()> {
    if args.until_stdin_closes {
        hanse_node::testnet::die_with_parent();
    }
    let data_dir = args.data_dir.clone().map_or_else(paths::data_dir, Ok)?;
    std::fs::create_dir_all(&data_dir).with_context(|| format!("cannot create {}", data_dir.display()))?;
    let identity = Identity::load_or_create(&data_dir.join("identity.key"))?;
    // The signals are caught from here on, so that one that comes while the node starts is not lost.
    let leaving = leave_signal(args.until_stdin_closes)?;
    tokio::pin!(leaving);
    let volunteer = tokio::select! {
        volunteer = start(&args, &identity) => volunteer?,
        _ = &mut leaving => return Ok(()),
    };
    report(&volunteer, args.json)?;
    let why = leaving.await;
    if !args.json {
        println!("leaving ({why}): finishing calls in progress");
    }
    let served = volunteer.shutdown().await;
    if !args.json {
        println!("served {} calls, {} rows", served.calls, served.pairs);
    }
    Ok(())
}

async fn start(args: &NodeArgs, identity: &Identity) -> anyhow::Result<Volunteer> {
    let dir = args.model.clone();
    let opening = move || -> anyhow::Result<_> {
        let checkpoint = Checkpoint::open(&dir)?;
        let id = model_id::of(&checkpoint)?;
        Ok((checkpoint, id))
    };
    let (checkpoint, id) = tokio::task::spawn_blocking(opening).await??;
    let hosting = match args.memory {
        Some(memory) => Hosting::MemoryBytes(memory.as_u64()),
        None => Hosting::Experts(args.experts.clone().unwrap_or(ExpertsSpec::All)),
    };
    let config = VolunteerConfig {
        network: args.network.clone(),
        listen: args.listen.clone(),
        data_listen: args.data_listen,
        advertise: args.advertise.clone(),
        bootstrap: args.bootstrap.clone(),
        // On loopback there is no local network to look around in.
        mdns: !args.no_mdns && !args.listen.iter().all(is_loopback),
        reach: ReachConfig {
            policy: if args.reachable { ReachPolicy::Reachable } else { ReachPolicy::Detect },
            serve_relay: !args.no_relay,
            upnp: !args.no_upnp,
            ..ReachConfig::default()
        },
        hosting,
        threads: args.threads,
        ..VolunteerConfig::default()
    };
    let bar = output::count_bar("loading experts");
    let shown = bar.clone();
    let volunteer = Volunteer::start(identity, &checkpoint, id, config, move |done, count| {
        shown.set_length(count as u64);
        shown.set_position(done as u64);
    })
    .await;
    bar.finish_and_clear();
    Ok(volunteer?)
}

fn report(volunteer: &Volunteer, json: bool) -> anyhow::Result<()> {
    let ready = Ready {
        peer_id: volunteer.peer_id().to_string(),
        addresses: volunteer.addresses().iter().map(ToString::to_string).collect(),
        data_addresses: volunteer.data_addresses().iter().map(ToString::to_string).collect(),
        data_listen: volunteer.data_listen().to_string(),
        reachability: volunteer.reachability().to_string(),
        experts: volunteer.store().len(),
        expert_bytes: volunteer.store().bytes(),
        model_id: volunteer.model().to_string(),
    };
    if json {
        return output::json(&ready);
    }
    println!("peer id   {}", ready.peer_id);
    println!("model     {}", ready.model_id);
    println!("hosting   {} experts, {}", ready.experts, output::bytes(ready.expert_bytes));
    println!("others join through");
    for address in &ready.addresses {
        println!("  --bootstrap {address}");
    }
    println!("serving; ctrl-C to leave");
    Ok(())
}

fn is_loopback(address: &Multiaddr) -> bool {
    address.iter().any(|part| match part {
        Protocol::Ip4(ip) => ip.is_loopback(),
        Protocol::Ip6(ip) => ip.is_loopback(),
        _ => false,
    })
}

/// Completes when the node should leave, with the reason.
fn leave_signal(until_stdin_closes: bool) -> anyhow::Result<impl Future<Output = &'static str>> {
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    Ok(async move {
        #[cfg(unix)]
        let terminated = terminate.recv();
        #[cfg(not(unix))]
        let terminated = std::future::pending::<Option<()>>();
        let stdin_closed = async {
            if !until_stdin_closes {
                std::future::pending::<()>().await;
            }
            // Whatever is written there is of no interest; an error means the same as the end.
            let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => "interrupted",
            _ = terminated => "terminated",
            () = stdin_closed => "standard input closed",
        }
    })
}
