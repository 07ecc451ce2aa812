//! What is looked at together with others: the port, who answers, how this machine is reached, and the clock.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use futures::future::join_all;
use hanse_node::{ADVERT_INTERVAL, ADVERT_LIFETIME};
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{
    Discovery, DiscoveryConfig, DiscoveryError, Reach, ReachConfig, Reachability, unix_ms,
};
use hanse_protocol::multiaddr::Protocol;
use hanse_protocol::{AdvertError, Identity, Multiaddr};
use hanse_router::NetworkConfig;

use super::{Check, Outcome};
use crate::cli::{DoctorArgs, JoinArgs};
use crate::output;

/// How long a member may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long AutoNAT, the router and relays may take.
const REACH_TIMEOUT: Duration = Duration::from_secs(25);
/// How long finding members to compare clocks with may take.
const CLOCK_TIMEOUT: Duration = Duration::from_secs(8);
/// Members whose clocks are compared with ours.
const CLOCKS: usize = 16;
/// A difference of clocks that is worth a word, and one that breaks things, in milliseconds.
const NOTABLE_MS: i64 = 10_000;
const WRONG_MS: i64 = 10 * 60_000;

/// How a client joins the network that is meant.
pub(super) fn client(join: &JoinArgs) -> NetworkConfig {
    let JoinArgs { bootstrap, network, mdns } = join;
    NetworkConfig { network: network.clone(), bootstrap: bootstrap.clone(), mdns: *mdns, ..NetworkConfig::default() }
}

/// `node_runs` says whether a node with this data folder runs, which then has the port.
pub(super) async fn look(args: &DoctorArgs, node_runs: bool) -> Vec<Check> {
    let (listening, answers) = tokio::join!(listen(args), bootstrap(&args.join));
    let mut checks = Vec::new();
    let discovery = match listening {
        Ok(discovery) => {
            checks.push(Check::ok("port", format!("can listen on {}", shown(&discovery.addresses()))));
            discovery
        }
        Err(error) => {
            checks.push(match (&error, node_runs) {
                (DiscoveryError::Listen { .. }, true) => Check::warn(
                    "port",
                    error.to_string(),
                    "the node that runs with this data folder has it: see `hanse status`",
                ),
                (DiscoveryError::Listen { .. }, false) => {
                    let advice =
                        "another program has it, or the address is not of this machine: choose another --listen";
                    Check::fail("port", error.to_string(), advice)
                }
                _ => Check::fail("port", error.to_string(), "correct what is named"),
            });
            checks.extend(answers);
            return checks;
        }
    };
    checks.extend(answers);
    if (!args.join.bootstrap.is_empty() || args.join.mdns) && discovery.wait_connected(ANSWER_TIMEOUT).await.is_ok() {
        let (reach, clock) = tokio::join!(reach(&discovery), clock(&discovery));
        checks.extend([reach, clock]);
    } else {
        let advice = "give --bootstrap ADDR of a member that answers";
        checks.push(Check::warn("nat", "not known: others must say how they reach this machine", advice));
        checks.push(Check::warn("clock", "not compared with anybody's", advice));
    }
    discovery.shutdown().await;
    checks
}

/// A member as `hanse node` would start it, but with a key of its own: two members with one key would confuse others.
async fn listen(args: &DoctorArgs) -> Result<Discovery, DiscoveryError> {
    let config = DiscoveryConfig {
        network: args.join.network.clone(),
        listen: args.listen.clone(),
        bootstrap: args.join.bootstrap.clone(),
        mdns: args.join.mdns,
        reach: ReachConfig { upnp: !args.no_upnp, serve_relay: false, ..ReachConfig::default() },
        ..DiscoveryConfig::default()
    };
    Discovery::start(&Identity::generate(), config).await
}

/// Whether each bootstrap address answers. One that does not is no more than a warning if another does.
async fn bootstrap(join: &JoinArgs) -> Vec<Check> {
    if join.bootstrap.is_empty() {
        let advice = "give --bootstrap ADDR of a member; the first node of a network has none";
        return vec![Check::warn("bootstrap", "nobody was asked", advice)];
    }
    let mut checks = join_all(join.bootstrap.iter().map(|address| answers(join, address))).await;
    if checks.iter().any(|check| check.outcome == Outcome::Ok) {
        for check in checks.iter_mut().filter(|check| check.outcome == Outcome::Fail) {
            check.outcome = Outcome::Warn;
        }
    }
    checks
}

async fn answers(join: &JoinArgs, address: &Multiaddr) -> Check {
    let config = DiscoveryConfig {
        network: join.network.clone(),
        bootstrap: vec![address.clone()],
        ..DiscoveryConfig::default()
    };
    let begun = Instant::now();
    let advice = "check the address and --network, and that the member runs; UDP must get through";
    let discovery = match Discovery::start(&Identity::generate(), config).await {
        Ok(discovery) => discovery,
        Err(error) => return Check::fail("bootstrap", error.to_string(), advice),
    };
    let answered = discovery.wait_connected(ANSWER_TIMEOUT).await;
    let elapsed = begun.elapsed();
    discovery.shutdown().await;
    match answered {
        Ok(()) => Check::ok("bootstrap", format!("{address} answers, after {} ms", elapsed.as_millis())),
        Err(error) => Check::fail("bootstrap", format!("{address}: {error}"), advice),
    }
}

/// How others reach a node here.
async fn reach(discovery: &Discovery) -> Check {
    let mut reports = discovery.reach();
    let is_settled = |reach: &Reach| reach.reachability == Reachability::Direct;
    // Relayed may become direct: AutoNAT takes its time.
    let _ = tokio::time::timeout(REACH_TIMEOUT, reports.wait_for(is_settled)).await;
    let found = reports.borrow().clone();
    let own: BTreeSet<IpAddr> = discovery.addresses().iter().filter_map(ip).collect();
    judge(&found, &own)
}

/// `own` are the addresses of this machine's interfaces that are listened on.
fn judge(reach: &Reach, own: &BTreeSet<IpAddr>) -> Check {
    let advice = "for the best speed, forward a UDP port on the router, and name it with --listen";
    match reach.reachability {
        Reachability::Direct => Check::ok(
            "nat",
            match reach.public_ips.first() {
                None if own.iter().all(IpAddr::is_loopback) => {
                    "none: loopback, which only this machine reaches".to_owned()
                }
                None => "none: a local network, whose members dial each other".to_owned(),
                Some(ip) if own.contains(ip) => format!("none: members dial {ip}, which is this machine's own"),
                Some(ip) => format!("the router forwards: members dial {ip}"),
            },
        ),
        Reachability::Relayed => Check::warn("nat", format!("members come through a relay{}", mapping(reach)), advice),
        Reachability::Unreachable => {
            let found = format!("members cannot reach a node here, and none relays{}", mapping(reach));
            Check::fail("nat", found, format!("{advice}; a client needs none of this"))
        }
    }
}

/// How the router maps ports, as members saw it.
fn mapping(reach: &Reach) -> &'static str {
    let seen: BTreeSet<&Multiaddr> = reach.observed.values().collect();
    match (reach.observed.len(), seen.len()) {
        (0 | 1, _) => "; too few members to see how the router maps ports",
        (_, 1) => "; the router keeps one port for all: holes are punched, and most clients then come directly",
        _ => "; the router takes a new port for each (symmetric NAT): no holes are punched, relays carry everything",
    }
}

/// Whether this machine's clock goes as others' do.
async fn clock(discovery: &Discovery) -> Check {
    let mut differences = Vec::new();
    let comparing = async {
        let Ok(mut volunteers) = discovery.providers(ProviderKey::volunteers()).await else { return };
        while differences.len() < CLOCKS
            && let Some(peer) = volunteers.recv().await
        {
            let Ok(adverts) = discovery.adverts_with_times(peer, None).await else { continue };
            let now = unix_ms();
            differences
                .extend(adverts.first().map(|(advert, wrong)| ahead_ms(now, advert.expires_unix_ms, wrong.as_ref())));
        }
    };
    let _ = tokio::time::timeout(CLOCK_TIMEOUT, comparing).await;
    differences.sort_unstable();
    let Some(&median) = differences.get(differences.len() / 2) else {
        return Check::warn("clock", "not compared: nobody hosts anything yet", "look again when a node runs");
    };
    let members = output::count(differences.len(), "member");
    let found = match median {
        0 => format!("as that of {members}"),
        _ => {
            let by = humantime::format_duration(Duration::from_secs(median.unsigned_abs() / 1000));
            format!("about {by} {} of {members}", if median > 0 { "ahead" } else { "behind" })
        }
    };
    let advice = "set the clock by the network's time: `timedatectl set-ntp true`";
    match median.saturating_abs() {
        ..NOTABLE_MS => Check::ok("clock", found),
        NOTABLE_MS..WRONG_MS => Check::warn("clock", found, advice),
        _ => Check::fail("clock", found, advice),
    }
}

/// How far our clock is ahead of an advert's author's, in milliseconds, at least; 0 if nothing speaks for a difference. `wrong` says what
/// was wrong with its times.
fn ahead_ms(now: u64, expires: u64, wrong: Option<&AdvertError>) -> i64 {
    let ms = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    let left = match wrong {
        Some(AdvertError::Expired(ago)) => -ms(*ago),
        Some(AdvertError::TooFarAhead(ahead)) => ms(*ahead),
        _ => i64::try_from(expires).unwrap_or(i64::MAX).saturating_sub(i64::try_from(now).unwrap_or(i64::MAX)),
    };
    // A true one was made within the last interval, give or take the way here.
    let (least, most) = (ms(ADVERT_LIFETIME - ADVERT_INTERVAL), ms(ADVERT_LIFETIME));
    if left < least { least.saturating_sub(left) } else { most.saturating_sub(left).min(0) }
}

fn ip(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    })
}

/// One address, without the peer id and not of loopback if there is another, and how many there are beside it.
fn shown(addresses: &[Multiaddr]) -> String {
    let is_outer = |address: &&Multiaddr| ip(address).is_some_and(|ip| !ip.is_loopback());
    let Some(first) = addresses.iter().find(is_outer).or(addresses.first()) else { return "nothing".to_owned() };
    let bare: Multiaddr = first.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect();
    match addresses.len() {
        1 => bare.to_string(),
        more => format!("{bare} and {} other addresses", more - 1),
    }
}

#[cfg(test)]
mod tests {
    use hanse_protocol::PeerId;

    use super::*;

    fn seen_at(addresses: &[&str]) -> Reach {
        let observed = addresses.iter().map(|address| (PeerId::random(), address.parse().unwrap())).collect();
        Reach { reachability: Reachability::Relayed, observed, ..Reach::default() }
    }

    #[test]
    fn a_nat_is_told_by_the_ports_that_members_see() {
        let found = |reach: &Reach| judge(reach, &BTreeSet::new()).found;
        let (one, other) = ("/ip4/203.0.113.7/udp/4001/quic-v1", "/ip4/203.0.113.7/udp/4002/quic-v1");
        assert!(found(&seen_at(&[one])).contains("too few"));
        assert!(found(&seen_at(&[one, one])).contains("one port for all"));
        assert!(found(&seen_at(&[one, other])).contains("symmetric"));
    }

    #[test]
    fn being_dialled_is_well_whatever_the_way() {
        let ip: IpAddr = "203.0.113.7".parse().unwrap();
        let direct = |ips: &[IpAddr], own: &[IpAddr]| {
            let reach = Reach { public_ips: ips.iter().copied().collect(), ..Reach::default() };
            let check = judge(&reach, &own.iter().copied().collect());
            assert_eq!((check.outcome, &check.advice), (Outcome::Ok, &None));
            check.found
        };
        let local = ["192.168.1.7".parse().unwrap()];
        assert!(direct(&[], &["127.0.0.1".parse().unwrap()]).contains("loopback"));
        assert!(direct(&[], &local).contains("local network"));
        assert!(direct(&[ip], &[ip]).contains("own"));
        assert!(direct(&[ip], &local).contains("forwards"));
        let none = Reach { reachability: Reachability::Unreachable, ..Reach::default() };
        assert_eq!(judge(&none, &BTreeSet::new()).outcome, Outcome::Fail);
    }

    #[test]
    fn a_clock_is_compared_within_what_adverts_can_tell() {
        let now = 1_000_000_000;
        let lifetime = u64::try_from(ADVERT_LIFETIME.as_millis()).unwrap();
        assert_eq!(ahead_ms(now, now + lifetime, None), 0, "just made");
        assert_eq!(ahead_ms(now, now + lifetime - 15_000, None), 0, "made a while ago");
        assert_eq!(ahead_ms(now, now + lifetime + 30_000, None), -30_000, "ours is behind");
        assert_eq!(ahead_ms(now, now + 40_000, None), 60_000, "ours is ahead");
        let hour = Duration::from_secs(3600);
        assert_eq!(ahead_ms(now, now, Some(&AdvertError::Expired(hour))), 3_600_000 + 100_000);
        assert_eq!(ahead_ms(now, now, Some(&AdvertError::TooFarAhead(hour))), -(3_600_000 - 120_000));
    }
}
