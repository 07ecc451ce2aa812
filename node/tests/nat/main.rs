//! Volunteers behind home routers, with real address translation: network namespaces and iptables masquerading.
//!
//! ```text
//!                          11.22.33.0/24
//!   bootstrap .10 ──┬── client .20 ──┬── router A .101 ──┬── router B .102
//!                                    │                   │
//!                              10.1.1.0/24         10.1.2.0/24
//!                             volunteer A .2       volunteer B .2
//! ```
//!
//! The street has addresses that nobody here talks to but that are not kept for documentation: routers refuse to open ports on those.
//!
//! Needs root, `ip` and `iptables`, and for routers that open ports `nft` and miniupnpd; skipped with the reason where something is
//! missing, unless `HANSE_NAT_TESTS=require`.

#![cfg(target_os = "linux")]

mod programs;
mod world;

use std::time::Duration;

use programs::{Node, local_tokens};
use world::{MANY_TOKENS, Nat, ROUTER_A, TOKENS, World, waits_for};

/// Two volunteers behind two routers, each with half of the experts.
fn halves(world: &World, bootstrap: &str) -> [Node; 2] {
    [("home-a", "0-5:0-7"), ("home-b", "0-5:8-15")]
        .map(|(home, experts)| world.node(home, &["--experts", experts, "--bootstrap", bootstrap]))
}

/// Whether a client has a direct connection to a volunteer. Frames may use it from the start: then there was no worse way before.
fn is_direct(log: &str, volunteer: &Node) -> bool {
    let tells = |line: &str| line.contains("better way") || line.contains("hole punched");
    log.lines().any(|line| tells(line) && line.contains(volunteer.peer_id()))
}

#[test]
fn volunteers_behind_routers_serve_exactly_and_holes_are_punched() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let volunteers = halves(&world, &boot.address());
    // The first frames may go through the relay; those that follow see the holes punched.
    let mut generation = world.generation("client", &boot.address(), MANY_TOKENS);
    waits_for("both are reached directly", || {
        let log = generation.log();
        assert!(generation.is_running(), "it ended before holes were punched:\n{log}");
        volunteers.iter().all(|volunteer| is_direct(&log, volunteer))
    });
    let generated = generation.end();
    assert_eq!(generated.tokens, local_tokens(MANY_TOKENS));
    assert_eq!(generated.network["peers"], 2, "{}", generated.network);
    assert!(generated.log.contains("hole punched"), "{}", generated.log);
}

#[test]
fn a_relay_carries_the_frames_where_no_hole_can_be_punched() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    let volunteers = halves(&world, &boot.address());
    let generated = world.generate(&boot.address());
    assert_eq!(generated.tokens, local_tokens(TOKENS));
    assert_eq!(generated.network["peers"], 2, "{}", generated.network);
    assert!(!generated.log.contains("hole punched") && !generated.log.contains("better way"), "{}", generated.log);
    for volunteer in &volunteers {
        assert_eq!(world.reachability(&boot.address(), volunteer.peer_id()), "relayed");
        assert!(!volunteer.log().contains("direct=true"), "no router lets AutoNAT in: {}", volunteer.log());
    }
}

#[test]
fn a_volunteer_behind_a_router_may_die_while_another_has_its_experts() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    // Which one a client asks is its own affair: on a busy machine it may do without the one that dies.
    assert!((0..3).any(|_| dies_in_use(&world)), "a volunteer that dies is in use");
}

/// Whether a volunteer that died was in use; the tokens are right in any case.
fn dies_in_use(world: &World) -> bool {
    let boot = world.bootstrap();
    // One that has everything is asked rather than two that have half each.
    let volunteers = [("home-a", "all"), ("home-b", "0-5:0-7"), ("home-b", "0-5:8-15")];
    let mut volunteers =
        volunteers.map(|(home, experts)| world.node(home, &["--experts", experts, "--bootstrap", &boot.address()]));
    let mut generation = world.generation("client", &boot.address(), MANY_TOKENS);
    waits_for("all are found", || generation.log().matches("peer found").count() == 3);
    std::thread::sleep(Duration::from_millis(700));
    assert!(generation.is_running(), "the volunteer is to die in the middle");
    volunteers[0].child.kill().unwrap();
    let expected = local_tokens(MANY_TOKENS);
    let disturbed = generation.end();
    assert_eq!(disturbed.tokens, expected);
    // Its records outlive it: who comes later finds them, and does without it.
    assert_eq!(world.generation("client", &boot.address(), MANY_TOKENS).end().tokens, expected);
    let network = &disturbed.network;
    let asked_again = ["retries", "hedged"].iter().filter_map(|count| network[count].as_u64()).sum::<u64>();
    asked_again > 0 && network["peers"] == 3
}

#[test]
fn a_volunteer_without_a_router_is_found_to_be_reachable() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    let volunteer = world.node("client", &["--bootstrap", &boot.address()]);
    waits_for("AutoNAT confirms its address", || volunteer.log().contains("direct=true"));
    assert_eq!(world.reachability(&boot.address(), volunteer.peer_id()), "direct");
    assert_eq!(world.generate(&boot.address()).tokens, local_tokens(TOKENS));
}

#[test]
fn a_router_that_takes_orders_opens_the_ports_of_both_planes() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let Some(_upnpd) = world.takes_orders("router-a") else { return };
    let boot = world.bootstrap();
    let mut volunteer = world.node("home-a", &["--bootstrap", &boot.address()]);
    waits_for("AutoNAT confirms what the router says", || volunteer.log().contains("direct=true"));
    waits_for("others know", || world.reachability(&boot.address(), volunteer.peer_id()) == "direct");
    let port = volunteer.data_port();
    world.count("client", ROUTER_A, port);
    let generated = world.generate(&boot.address());
    assert_eq!(generated.tokens, local_tokens(TOKENS));
    let (frames, all) = (generated.network["bytes_sent"].as_u64().unwrap(), world.sent("client"));
    assert!(all > frames, "{frames} bytes of frames, {all} to the data plane: {}", generated.log);
    let rules = || world.says("router-a", "nft list chain inet upnp inward");
    assert!(rules().contains(&format!(":{port}")), "{}", rules());
    volunteer.leave();
    assert!(!rules().contains("dnat"), "it gives the ports back: {}", rules());
}

#[test]
fn a_port_that_the_owner_forwards_later_is_found_without_a_restart() {
    let Some(world) = World::new(Nat::Symmetric) else { return };
    let boot = world.bootstrap();
    let listen = ["--listen", "/ip4/0.0.0.0/udp/4001/quic-v1", "--data-listen", "0.0.0.0:4002"];
    let volunteer = world.node("home-a", &[&["--bootstrap", &boot.address()], &listen[..]].concat());
    waits_for("AutoNAT finds it unreachable", || volunteer.log().contains("result=Err"));
    waits_for("a relay leads to it", || world.reachability(&boot.address(), volunteer.peer_id()) == "relayed");
    let forward = "iptables -t nat -A PREROUTING -i eth0 -p udp -m multiport --dports 4001,4002 -j DNAT --to 10.1.1.2";
    world.inside("router-a", forward).unwrap();
    waits_for("AutoNAT tests again", || volunteer.log().contains("direct=true"));
    waits_for("others know", || world.reachability(&boot.address(), volunteer.peer_id()) == "direct");
    world.count("client", ROUTER_A, 4002);
    let generated = world.generate(&boot.address());
    assert_eq!(generated.tokens, local_tokens(TOKENS));
    let frames = generated.network["bytes_sent"].as_u64().unwrap();
    assert!(world.sent("client") > frames, "the data plane is reached directly: {}", generated.log);
}

#[test]
fn a_volunteer_that_gets_another_address_says_so_at_once_and_is_used_again() {
    let Some(mut world) = World::new(Nat::KeepsPorts) else { return };
    world.moves_in("mover", "11.22.33.30");
    let boot = world.bootstrap();
    let volunteer = world.node("mover", &["--bootstrap", &boot.address()]);
    waits_for("AutoNAT confirms its address", || volunteer.log().contains("direct=true"));
    let mut generation = world.generation("client", &boot.address(), MANY_TOKENS);
    waits_for("it is found", || generation.log().contains("peer found"));
    std::thread::sleep(Duration::from_millis(700));
    assert!(generation.is_running(), "the volunteer is to move in the middle");
    world.readdress("mover", "11.22.33.30", "11.22.33.31");
    let expected = local_tokens(MANY_TOKENS);
    assert_eq!(generation.end().tokens, expected, "who was using it goes on");
    waits_for("AutoNAT confirms its new address", || volunteer.log().matches("direct=true").count() == 2);
    assert_eq!(world.generation("client", &boot.address(), MANY_TOKENS).end().tokens, expected, "newcomers find it");
    waits_for("others know", || world.reachability(&boot.address(), volunteer.peer_id()) == "direct");
    assert!(!volunteer.log().contains("panicked"), "{}", volunteer.log());
}

#[test]
fn a_host_name_that_leads_elsewhere_is_followed() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    world.inside("boot", "ip address add 11.22.33.11/24 dev eth0").unwrap();
    world.harbour("home-a", "11.22.33.10");
    let boot = world.bootstrap();
    let volunteer = world.node("home-a", &["--bootstrap", "/dns4/harbour/udp/4001/quic-v1"]);
    waits_for("a relay leads to it", || world.reachability(&boot.address(), volunteer.peer_id()) == "relayed");
    drop(boot);
    world.harbour("home-a", "11.22.33.11");
    let elsewhere = world.bootstrap_at("11.22.33.11");
    waits_for("it joins there", || world.reachability(&elsewhere.address(), volunteer.peer_id()) == "relayed");
}

#[test]
fn holes_are_punched_also_for_those_who_joined_over_tcp() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let tcp = boot.addresses().into_iter().find(|address| address.contains("/tcp/")).unwrap();
    let _volunteers = halves(&world, &tcp);
    // Its first try may come before it knows its address for QUIC, and the next one comes seconds later.
    let mut client = world.conversation("client", &tcp);
    waits_for("a hole is punched", || {
        assert!(client.is_running(), "it ended before a hole was punched:\n{}", client.log());
        let log = client.log();
        log.contains("hole punched") && log.contains("2 peers")
    });
}

#[test]
fn a_hole_is_punched_through_two_routers() {
    let Some(world) = World::new(Nat::KeepsPorts) else { return };
    let boot = world.bootstrap();
    let volunteer = world.node("home-b", &["--bootstrap", &boot.address()]);
    let mut generation = world.generation("home-a", &boot.address(), MANY_TOKENS);
    waits_for("it is reached directly", || {
        let log = generation.log();
        assert!(generation.is_running(), "it ended before a hole was punched:\n{log}\n{}", volunteer.log());
        is_direct(&log, &volunteer)
    });
    assert_eq!(generation.end().tokens, local_tokens(MANY_TOKENS));
}

#[test]
fn the_doctor_tells_which_kind_of_router_stands_before_a_node() {
    for (nat, told) in [(Nat::KeepsPorts, "one port for all"), (Nat::Symmetric, "symmetric")] {
        let Some(world) = World::new(nat) else { return };
        let bootstrap = world.bootstrap();
        let address = bootstrap.address();
        // Two members are needed to compare what they see.
        let listen = ["--listen", "/ip4/11.22.33.20/udp/4001/quic-v1", "--reachable"];
        let _other = world.node("client", &[&["--experts", "all", "--bootstrap", &address], &listen[..]].concat());
        let doctor = ["doctor", "--json", "--no-upnp", "--bootstrap", &address];
        let output = world.runs("home-a", &doctor);
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let of =
            |name: &str| document["checks"].as_array().unwrap().iter().find(|check| check["check"] == name).unwrap();
        assert_eq!(of("bootstrap")["outcome"], "ok", "{document}");
        assert_eq!(of("clock")["outcome"], "ok", "{document}");
        assert_eq!(of("nat")["outcome"], "warn", "{document}");
        let found = of("nat")["found"].as_str().unwrap();
        assert!(found.contains("through a relay") && found.contains(told), "{nat:?}: {found}");
        assert!(output.status.success());
    }
}
