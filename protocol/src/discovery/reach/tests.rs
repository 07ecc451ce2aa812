use super::*;

fn config(listen: &str, bootstrap: &[&str], policy: ReachPolicy) -> DiscoveryConfig {
    DiscoveryConfig {
        listen: vec![listen.parse().unwrap()],
        bootstrap: bootstrap.iter().map(|address| address.parse().unwrap()).collect(),
        reach: ReachConfig { policy, ..ReachConfig::default() },
        ..DiscoveryConfig::default()
    }
}

const ALL: &str = "/ip4/0.0.0.0/udp/0/quic-v1";
const PUBLIC: &str = "/ip4/203.0.113.7/udp/4001/quic-v1";

#[test]
fn only_joining_through_the_open_internet_leaves_reachability_open() {
    let standing = |bootstrap: &[&str]| Standing::of(&config(ALL, bootstrap, ReachPolicy::Detect));
    assert_eq!(standing(&[]), Standing::Reachable, "the first member");
    assert_eq!(standing(&["/ip4/192.168.1.2/udp/4001/quic-v1"]), Standing::Reachable, "a local network");
    assert_eq!(standing(&[PUBLIC]), Standing::Unconfirmed);
    assert_eq!(Standing::of(&config(ALL, &[PUBLIC], ReachPolicy::Reachable)), Standing::Reachable);
    assert_eq!(Standing::of(&DiscoveryConfig::default()), Standing::Client);
}

#[test]
fn relays_are_used_until_an_address_is_confirmed() {
    let mut state = ReachState::new(&config(ALL, &[PUBLIC], ReachPolicy::Detect));
    let (relay, now, listener) = (PeerId::random(), Instant::now(), ListenerId::next());
    let relay_address: Multiaddr = PUBLIC.parse().unwrap();
    state.note_relay(PeerId::random(), false, Some(&relay_address));
    state.note_relay(PeerId::random(), true, Some(&"/ip4/10.0.0.1/udp/1/quic-v1".parse().unwrap()));
    assert!(state.wanted_relays(now).is_empty(), "the one does not relay, the other is local");
    state.note_relay(relay, true, Some(&relay_address));
    assert_eq!(state.reach().reachability, Reachability::Unreachable);
    let circuit = relay_address.with(Protocol::P2p(relay)).with(Protocol::P2pCircuit);
    assert_eq!(state.wanted_relays(now), [(relay, circuit.clone())]);
    state.asked(listener, relay);
    assert!(state.wanted_relays(now).is_empty());
    state.reserved(listener, &circuit);
    assert_eq!(state.reach().reachability, Reachability::Relayed);
    assert_eq!(state.reach().circuits, [circuit]);

    let own: Multiaddr = "/ip4/198.51.100.1/udp/4001/quic-v1".parse().unwrap();
    state.confirm(&"/ip4/192.168.1.7/udp/4001/quic-v1".parse().unwrap());
    assert!(!state.is_direct(), "a private address is reached from the neighbourhood only");
    state.confirm(&own);
    assert_eq!(state.reach().reachability, Reachability::Direct);
    assert_eq!(state.needless_relays(), [listener]);
    assert!(state.is_surely_direct());
    assert!(!state.failed(&own), "one tester may be wrong");
    assert!(state.is_direct() && !state.is_surely_direct());
    state.confirm(&own);
    assert!(!state.failed(&own), "a success counts");
    assert!(state.failed(&own));
    state.expire(&own);
    assert!(!state.is_direct());
    state.lost(listener, now);
    assert!(state.wanted_relays(now).is_empty(), "a lost relay is left alone for a while");
    assert_eq!(state.wanted_relays(now + RELAY_RETURN).len(), 1);
    state.asked(listener, relay);
    state.lost(listener, now);
    assert!(state.wanted_relays(now + RELAY_RETURN).is_empty(), "one that refuses for longer");
    assert_eq!(state.wanted_relays(now + RELAY_RETRY).len(), 1);
}

#[test]
fn where_members_see_this_one_is_kept_of_a_few() {
    let mut state = ReachState::new(&config(ALL, &[PUBLIC], ReachPolicy::Detect));
    let seen: Multiaddr = "/ip4/198.51.100.1/udp/4001/quic-v1".parse().unwrap();
    for useless in ["/ip4/192.168.1.7/udp/4001/quic-v1", "/ip4/198.51.100.1/tcp/4001"] {
        state.observed_by(PeerId::random(), useless.parse().unwrap());
    }
    assert!(state.reach().observed.is_empty(), "a neighbour's view, and a way that no holes are punched on");
    for _ in 0..2 * MAX_OBSERVERS {
        state.observed_by(PeerId::random(), seen.clone());
    }
    assert_eq!(state.reach().observed.len(), MAX_OBSERVERS);
}

#[test]
fn a_reachable_member_tells_no_loopback_address_unless_it_has_no_other() {
    let external = |listen: &str, policy, address: &str| {
        ReachState::new(&config(listen, &[], policy)).is_external(&address.parse().unwrap())
    };
    let loopback = "/ip4/127.0.0.1/udp/4001/quic-v1";
    assert!(!external(ALL, ReachPolicy::Reachable, loopback));
    assert!(external(loopback, ReachPolicy::Reachable, loopback));
    assert!(!external(loopback, ReachPolicy::Detect, loopback), "a network on loopback needs none");
    assert!(external(ALL, ReachPolicy::Detect, PUBLIC));
}
