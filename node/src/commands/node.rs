//! `hanse node`: volunteer.

mod cards;
mod plan;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hanse_model::Checkpoint;
use hanse_node::owner::control::{Command, Control, Request};
use hanse_node::owner::load::{OthersLoad, cpu_time, load_average};
use hanse_node::owner::{CardWatch, Comfort, DataDirLock, LockError, minute_of_day};
use hanse_node::placement::ExpertTable;
use hanse_node::{ExpertsSpec, Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::discovery::{ReachConfig, ReachPolicy};
use hanse_protocol::multiaddr::Protocol;
use hanse_protocol::{Identity, Multiaddr};
use hanse_router::NetworkConfig;
use hanse_router::client::layout_of;
use hanse_router::weights::RemoteModel;
use serde::Serialize;
use tokio::io::AsyncReadExt;

use crate::cli::NodeArgs;
use crate::model::Model;
use crate::output::say;
use crate::signals::told_to_end;
use crate::{output, paths};
use cards::Cards;

/// A node that was asked to leave has gone after this, whatever its clients do.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// How often the clock and the machine's load are looked at.
const COMFORT_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Ready {
    peer_id: String,
    addresses: Vec<String>,
    data_addresses: Vec<String>,
    data_listen: String,
    reachability: String,
    experts: usize,
    expert_bytes: u64,
    /// What computes them.
    devices: Vec<String>,
    /// Read from others since the start; nothing of it where the model is a folder.
    fetched_bytes: u64,
    model_id: String,
}

pub(crate) async fn run(args: NodeArgs) -> anyhow::Result<()> {
    if args.until_stdin_closes {
        hanse_node::testnet::die_with_parent();
    }
    let data_dir = args.data_dir.clone().map_or_else(paths::data_dir, Ok)?;
    if args.plan {
        return plan::run(&args, &data_dir).await;
    }
    let (data_dir, _lock) = hold(data_dir, args.data_dir.is_some())?;
    let identity = Identity::load_or_create(&data_dir.join("identity.key"))?;
    // The signals are caught from here on, so that one that comes while the node starts is not lost.
    let leaving = leave_signal(args.until_stdin_closes)?;
    tokio::pin!(leaving);
    let control = Control::listen(&data_dir);
    let control = control.map_err(|error| tracing::warn!(%error, "hanse pause will not reach this node")).ok();
    // Before anything of a card is used.
    let watch = cards::before(&args).await?;
    // Reading or fetching a large model takes a while, in which the node may be asked to leave as well.
    let opened = async {
        let model = open(&args).await?;
        if args.keep_trunk {
            model.fetch_trunk().await?;
        }
        anyhow::Ok(model)
    };
    let model = tokio::select! {
        opened = opened => opened?,
        _ = &mut leaving => return Ok(()),
    };
    let (checkpoint, id) = (model.checkpoint(), model.id());
    let mut config = config(&args, checkpoint)?;
    config.remote = model.remote().cloned();
    if !args.give_no_weights {
        config.shelf = Some(model.shelf()?);
        config.give_bytes_per_second = args.give_rate.map(|rate| rate.as_u64());
    }
    let bar = output::count_bar(if model.remote().is_some() { "fetching experts" } else { "loading experts" });
    let shown = bar.clone();
    let progress = move |done, count| {
        shown.set_length(count as u64);
        shown.set_position(done as u64);
    };
    let mut volunteer = Volunteer::join(&identity, checkpoint, id, config, progress).await?;
    let why = tokio::select! {
        served = serve(&mut volunteer, &args, control, watch, &bar, model.remote()) => match served {
            Ok(never) => match never {},
            Err(error) => {
                // A node that cannot host what it should leaves as politely as any other.
                volunteer.shutdown().await;
                return Err(error);
            }
        },
        why = &mut leaving => why,
    };
    bar.finish_and_clear();
    if !args.json {
        say!("leaving ({why}): finishing calls in progress");
    }
    let Ok(served) = tokio::time::timeout(LEAVE_LIMIT, volunteer.shutdown()).await else {
        tracing::warn!("some calls did not end within {LEAVE_LIMIT:?}");
        return Ok(());
    };
    if !args.json {
        say!("served {} calls, {} rows", served.calls, served.pairs);
    }
    Ok(())
}

/// Takes hold of the data folder. If it is the default one and another node has it, a further one beside it is taken, so that
/// a second node on a machine has an identity of its own.
fn hold(dir: PathBuf, was_named: bool) -> anyhow::Result<(PathBuf, DataDirLock)> {
    const MOST: usize = 64;
    let mut candidate = dir.clone();
    for number in 2..=MOST + 1 {
        std::fs::create_dir_all(&candidate).with_context(|| format!("cannot create {}", candidate.display()))?;
        match DataDirLock::acquire(&candidate) {
            Err(LockError::InUse { .. }) if !was_named && number <= MOST => {
                let mut name = dir.clone().into_os_string();
                name.push(format!("-{number}"));
                candidate = name.into();
            }
            outcome => {
                let lock = outcome?;
                if candidate != dir {
                    eprintln!("{} is in use by another node: this one uses {}", dir.display(), candidate.display());
                }
                return Ok((candidate, lock));
            }
        }
    }
    bail!("{MOST} nodes run on this machine: give this one a folder of its own with --data-dir")
}

/// Reports when everything is loaded, and pauses and resumes as the owner wants; ends only if the experts cannot be loaded, or
/// no device works any more.
async fn serve(
    volunteer: &mut Volunteer,
    args: &NodeArgs,
    mut control: Option<Control>,
    watch: Option<Arc<CardWatch>>,
    bar: &indicatif::ProgressBar,
    remote: Option<&RemoteModel>,
) -> anyhow::Result<std::convert::Infallible> {
    let mut comfort = Comfort::new(args.limits.quiet_hours, args.limits.yield_above);
    let cpu_time = || cpu_time().unwrap_or_default();
    let mut others = OthersLoad::new(Instant::now(), cpu_time());
    let mut looks = tokio::time::interval(COMFORT_INTERVAL);
    let mut cards = match watch {
        Some(watch) => Some(Cards::watch(watch, volunteer).await?),
        None => None,
    };
    let mut is_loaded = false;
    let (mut paused_for, mut last_state) = (None, "serving".to_owned());
    loop {
        let request = tokio::select! {
            loaded = volunteer.loaded(), if !is_loaded => {
                loaded?;
                is_loaded = true;
                bar.finish_and_clear();
                report(volunteer, remote, args.json)?;
                continue;
            }
            request = next_request(&mut control) => Some(request),
            () = changed(&mut cards) => None,
            _ = looks.tick() => None,
        };
        // What watches over this process starts it again.
        let store = volunteer.store();
        anyhow::ensure!(
            !store.devices().is_empty() || !store.lent().is_empty(),
            "every device has failed: start the node anew"
        );
        match request.as_ref().map(|request| request.command) {
            Some(Command::Pause) => comfort.ask(true),
            Some(Command::Resume) => comfort.ask(false),
            Some(Command::Ready) | None => {}
        }
        let load = load_average().map(|average| others.update(Instant::now(), cpu_time(), average));
        let all_taken = cards.as_mut().and_then(|cards| cards.look(volunteer));
        let reason = comfort.reason(Instant::now(), minute_of_day(), load, all_taken);
        let tell = async {
            let changed = match reason {
                _ if reason == paused_for => Ok(()),
                Some(reason) => volunteer.pause(reason.announced()).await,
                None => volunteer.resume().await,
            };
            // The next advert, seconds later, says it again.
            changed.unwrap_or_else(|error| tracing::warn!(%error, "advert not renewed"));
        };
        let follow = async {
            match &mut cards {
                Some(cards) => cards.follow(volunteer).await,
                None => Ok(()),
            }
        };
        // Who takes a card does not wait for adverts; calls are refused from the first step on.
        let ((), followed) = tokio::join!(tell, follow);
        followed?;
        paused_for = reason;
        let without = cards.as_ref().map(Cards::text).unwrap_or_default();
        let state = reason.map_or_else(|| format!("serving{without}"), |reason| format!("paused: {reason}"));
        if state != last_state {
            tracing::info!(%state, "by the owner's wish");
            if !args.json {
                say!("{state}");
            }
            last_state.clone_from(&state);
        }
        if let Some(request) = request {
            let is_early = request.command == Command::Ready && !is_loaded;
            let answer = if is_early { "error: experts are still being loaded".to_owned() } else { state };
            // Who asked may have gone.
            let _ = request.answer.send(answer);
        }
    }
}

/// Completes when others want a card or have left one.
async fn changed(cards: &mut Option<Cards>) {
    match cards {
        Some(cards) => cards.changed().await,
        None => std::future::pending().await,
    }
}

async fn next_request(control: &mut Option<Control>) -> Request {
    match control {
        Some(control) => control.next().await,
        None => std::future::pending().await,
    }
}

/// The model, found on the network if it is not here.
async fn open(args: &NodeArgs) -> anyhow::Result<Model> {
    let network = NetworkConfig {
        network: args.network.clone(),
        bootstrap: args.bootstrap.clone(),
        mdns: looks_around(args),
        ..NetworkConfig::default()
    };
    Model::open(&args.model, &network, &args.cache).await
}

/// On loopback there is no local network to look around in.
fn looks_around(args: &NodeArgs) -> bool {
    !args.no_mdns && !args.listen.iter().all(is_loopback)
}

fn config(args: &NodeArgs, checkpoint: &Checkpoint) -> anyhow::Result<VolunteerConfig> {
    let limits = &args.limits;
    let most = limits.max_memory.map_or(u64::MAX, |most| most.as_u64());
    let hosting = match args.memory {
        Some(memory) => Hosting::MemoryBytes(memory.as_u64().min(most)),
        None => {
            let spec = args.experts.clone().unwrap_or(ExpertsSpec::All);
            let wanted = spec.resolve(&layout_of(checkpoint.spec()), checkpoint.spec().layers.len() as u32)?;
            let bytes = ExpertTable::of(checkpoint).bytes(&wanted);
            anyhow::ensure!(
                bytes <= most,
                "the experts wanted take {}, more than --max-memory allows: name fewer with --experts, or give --memory",
                output::bytes(bytes)
            );
            Hosting::Experts(spec)
        }
    };
    let threads = match limits.max_cores {
        Some(most) if args.threads == 0 || args.threads > most.into() => {
            usize::from(most).min(std::thread::available_parallelism().map_or(usize::MAX, |cores| cores.get()))
        }
        _ => args.threads,
    };
    Ok(VolunteerConfig {
        network: args.network.clone(),
        listen: args.listen.clone(),
        data_listen: args.data_listen,
        advertise: args.advertise.clone(),
        bootstrap: args.bootstrap.clone(),
        mdns: looks_around(args),
        reach: ReachConfig {
            policy: if args.reachable { ReachPolicy::Reachable } else { ReachPolicy::Detect },
            serve_relay: !args.no_relay,
            upnp: !args.no_upnp,
            ..ReachConfig::default()
        },
        hosting,
        device: args.device.clone(),
        threads,
        keep_files: limits.yield_to_others,
        max_bandwidth: limits.max_bandwidth.map(|rate| rate.as_u64()),
        ..VolunteerConfig::default()
    })
}

fn report(volunteer: &Volunteer, remote: Option<&RemoteModel>, json: bool) -> anyhow::Result<()> {
    let by_source = remote.map(|remote| remote.fetcher().bytes_by_source()).unwrap_or_default();
    let ready = Ready {
        peer_id: volunteer.peer_id().to_string(),
        addresses: volunteer.addresses().iter().map(ToString::to_string).collect(),
        data_addresses: volunteer.data_addresses().iter().map(ToString::to_string).collect(),
        data_listen: volunteer.data_listen().to_string(),
        reachability: volunteer.reachability().to_string(),
        experts: volunteer.store().len(),
        expert_bytes: volunteer.store().bytes(),
        devices: volunteer.store().devices().iter().map(|device| device.name().to_owned()).collect(),
        fetched_bytes: by_source.iter().map(|(_, bytes)| bytes).sum(),
        model_id: volunteer.model().to_string(),
    };
    for (source, bytes) in &by_source {
        tracing::info!(%source, bytes, "fetched");
    }
    if json {
        return output::json(&ready);
    }
    say!("peer id   {}", ready.peer_id);
    say!("model     {}", ready.model_id);
    say!("hosting   {} experts, {}, on {}", ready.experts, output::bytes(ready.expert_bytes), ready.devices.join(", "));
    if ready.fetched_bytes > 0 {
        say!("fetched   {} from {} sources", output::bytes(ready.fetched_bytes), by_source.len());
    }
    say!("others join through");
    for address in &ready.addresses {
        say!("  --bootstrap {address}");
    }
    say!("serving; ctrl-C to leave");
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
fn leave_signal(until_stdin_closes: bool) -> std::io::Result<impl Future<Output = &'static str>> {
    let ended = told_to_end()?;
    Ok(async move {
        let stdin_closed = async {
            if !until_stdin_closes {
                std::future::pending::<()>().await;
            }
            // Whatever is written there is of no interest; an error means the same as the end.
            let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
        };
        tokio::select! {
            why = ended => why,
            () = stdin_closed => "standard input closed",
        }
    })
}
