use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hanse_protocol::HostedExperts;

use super::*;

/// `layers` layers of `experts` experts of 10 bytes.
fn table(layers: u32, experts: u32) -> Arc<ExpertTable> {
    let layers: BTreeMap<u32, (u32, u64)> = (0..layers).map(|layer| (layer, (experts, 10))).collect();
    Arc::new(ExpertTable::new(&layers))
}

fn set(experts: impl IntoIterator<Item = (u32, u32)>) -> HostedExperts {
    let mut set = HostedExperts::new();
    experts.into_iter().for_each(|(layer, expert)| set.insert(layer, expert).unwrap());
    set
}

fn nothing() -> HostedExperts {
    HostedExperts::new()
}

fn view(table: &Arc<ExpertTable>, members: &[HostedExperts]) -> View {
    let mut view = View::new(table.clone());
    members.iter().for_each(|member| view.add(member, &[], &HostedExperts::new()));
    view
}

/// Whole layers.
fn layers(layers: std::ops::Range<u32>, experts: u32) -> HostedExperts {
    set(layers.flat_map(|layer| (0..experts).map(move |expert| (layer, expert))))
}

#[test]
fn the_rarest_experts_are_taken_first() {
    let hosted = set([(0, 0), (0, 1), (0, 2), (0, 3), (1, 1)]);
    assert_eq!(choose(&view(&table(2, 4), &[hosted]), &nothing(), 30, 0), [(1, 0), (1, 2), (1, 3)]);
}

#[test]
fn the_budget_is_never_exceeded_and_everything_is_taken_when_it_fits() {
    let view = view(&table(2, 4), &[]);
    assert_eq!(choose(&view, &nothing(), 39, 0).len(), 3);
    assert_eq!(choose(&view, &nothing(), 1000, 1).len(), 8);
    assert!(choose(&view, &nothing(), 9, 0).is_empty());
    assert!(choose(&View::new(table_of_nothing()), &nothing(), 1000, 0).is_empty());
}

fn table_of_nothing() -> Arc<ExpertTable> {
    Arc::new(ExpertTable::new(&BTreeMap::new()))
}

#[test]
fn whole_layers_are_taken_where_all_experts_are_as_rare() {
    let view = view(&table(8, 64), &[]);
    for seed in 0..20 {
        let chosen = choose(&view, &nothing(), 10 * 64 * 2, seed);
        let layers: std::collections::BTreeSet<u32> = chosen.iter().map(|(layer, _)| *layer).collect();
        assert_eq!((chosen.len(), layers.len()), (128, 2));
    }
}

#[test]
fn members_with_different_seeds_take_different_layers() {
    let view = view(&table(16, 16), &[]);
    let first_layers: std::collections::BTreeSet<u32> =
        (0..64).map(|seed| choose(&view, &nothing(), 10 * 16, seed)[0].0).collect();
    assert!(first_layers.len() >= 12, "{first_layers:?}");
    assert_eq!(choose(&view, &nothing(), 160, 7), choose(&view, &nothing(), 160, 7));
}

#[test]
fn what_lies_on_the_disk_is_taken_again_whoever_chooses() {
    let view = view(&table(16, 64), &[layers(0..16, 64)]);
    for seed in 0..20 {
        for experts in [1, 3, 8, 64, 100, 700] {
            let first = choose(&view, &nothing(), 10 * experts, seed);
            let again = choose(&view, &set(first.iter().copied()), 10 * experts, seed + 1000);
            let fetched = again.iter().filter(|pair| !first.contains(pair)).count() as u64;
            // The last few places may be filled in another order.
            assert!(fetched <= experts / 100, "{fetched} of {experts} experts, seed {seed}");
        }
    }
}

#[test]
fn rarer_experts_are_taken_though_others_lie_on_the_disk() {
    let table = table(4, 16);
    // Layers 0 and 1 have two replicas, layer 2 has one, layer 3 none.
    let members = [layers(0..3, 16), layers(0..2, 16)];
    let at_hand = layers(0..2, 16);
    for seed in 0..20 {
        let view = view(&table, &members);
        assert!(choose(&view, &at_hand, 160, seed).iter().all(|(layer, _)| *layer == 3));
        assert!(choose(&view, &at_hand, 320, seed).iter().all(|(layer, _)| *layer >= 2));
        // Two replicas more, or four times the demand, also weigh more than the way to the disk.
        let mut view = super::View::new(table.clone());
        for _ in 0..3 {
            let all = layers(0..4, 16);
            let steps: Vec<u8> = all.iter().map(|(layer, _)| if layer == 3 { 8 } else { 6 }).collect();
            view.add(&all, &steps, &nothing());
        }
        assert!(choose(&view, &at_hand, 160, seed).iter().all(|(layer, _)| *layer == 3));
    }
}

#[test]
fn the_most_wanted_are_taken_where_all_have_enough_replicas() {
    let table = table(4, 8);
    let all = layers(0..4, 8);
    let mut view = View::new(table);
    for _ in 0..2 {
        // Layer 2 is called 64 times as often as the others.
        let steps: Vec<u8> = all.iter().map(|(layer, _)| if layer == 2 { 10 } else { 4 }).collect();
        view.add(&all, &steps, &HostedExperts::new());
    }
    assert!(choose(&view, &nothing(), 80, 3).iter().all(|(layer, _)| *layer == 2));
}

#[test]
fn what_others_are_loading_counts_as_a_replica() {
    let mut view = View::new(table(2, 4));
    view.add(&HostedExperts::new(), &[], &layers(0..1, 4));
    assert_eq!(choose(&view, &nothing(), 40, 5), [(1, 0), (1, 1), (1, 2), (1, 3)]);
}

#[test]
fn members_that_leave_and_adverts_that_expired_do_not_count() {
    use hanse_protocol::{Advert, Draining, ModelId, Precision, WireDtype};
    let advert = |draining, expires_unix_ms| Advert {
        model: ModelId([0; 32]),
        hosted: layers(0..1, 4),
        layers: [(0, 4), (1, 4)].into(),
        wire_dtypes: WireDtype::ALL.to_vec(),
        data_addresses: Vec::new(),
        capacity_rows: 1,
        load_permille: 0,
        draining,
        sequence: 1,
        expires_unix_ms,
        popularity: Vec::new(),
        loading: HostedExperts::new(),
        reachability: hanse_protocol::discovery::Reachability::Direct,
        circuits: Vec::new(),
        precision: Precision::F32,
        variant_of: None,
    };
    let adverts = [advert(None, 2000), advert(Some(Draining::Leaving), 2000), advert(None, 1000)];
    let view = View::of(table(2, 4), &adverts, 1000);
    assert_eq!((view.members(), view.replicas(0, 0), view.replicas(1, 0)), (1, 1, 0));
}

#[test]
fn a_lost_expert_is_taken_for_one_that_others_have() {
    let table = table(4, 8);
    // Three members host layers 0 to 2, nobody layer 3.
    let own = layers(0..3, 8);
    let found = rebalance(&view(&table, &[own.clone(), own.clone(), own.clone()]), &own, 240, 1).unwrap();
    assert!(found.take.iter().all(|(layer, _)| *layer == 3), "{found:?}");
    assert_eq!(found.take.len(), found.give.len());
    assert!(found.gain >= HYSTERESIS * found.loss);
}

#[test]
fn a_quarter_of_what_is_hosted_moves_at_a_time_and_each_expert_once() {
    let table = table(8, 8);
    // Four members host layers 0 to 3, nobody the others. Blocks of these layers are single experts.
    let own = layers(0..4, 8);
    let found = rebalance(&view(&table, &vec![own.clone(); 4]), &own, 320, 1).unwrap();
    assert_eq!((found.take.len(), found.give.len()), (8, 8));
    assert!(found.take.iter().all(|(layer, _)| *layer >= 4) && found.give.iter().all(|(layer, _)| *layer < 4));
    for pairs in [&found.take, &found.give] {
        assert_eq!(set(pairs.iter().copied()).count(), 8, "{pairs:?}");
    }
    assert!(found.openings < 8, "fewer may move at the same time: {}", found.openings);
}

#[test]
fn a_move_is_called_off_when_others_have_made_it_meanwhile() {
    let table = table(4, 8);
    let own = layers(0..3, 8);
    let others = [own.clone(), own.clone()];
    let found = rebalance(&view(&table, &[own.clone(), own.clone(), own.clone()]), &own, 240, 1).unwrap();
    assert!(found.still_gains(&view(&table, &others)));
    let taken = set(found.take.iter().copied());
    let made = [own.clone(), own.clone(), taken.clone(), taken];
    assert!(!found.still_gains(&view(&table, &made)), "there are two replicas now");
    let kept = set(own.iter().filter(|pair| !found.give.contains(pair)));
    assert!(!found.still_gains(&view(&table, &[kept.clone(), kept])), "nobody else hosts what would be given up");
}

#[test]
fn the_last_replica_is_never_given_up() {
    let table = table(4, 8);
    let own = layers(0..2, 8);
    assert_eq!(rebalance(&view(&table, std::slice::from_ref(&own)), &own, 160, 1), None);
    let loading_elsewhere = {
        let mut view = view(&table, std::slice::from_ref(&own));
        view.add(&HostedExperts::new(), &[], &own);
        view
    };
    assert_eq!(rebalance(&loading_elsewhere, &own, 160, 1), None, "others do not host it yet");
}

#[test]
fn spare_memory_is_used_without_giving_anything_up() {
    let table = table(4, 8);
    let own = layers(0..2, 8);
    let found = rebalance(&view(&table, std::slice::from_ref(&own)), &own, 200, 1).unwrap();
    assert!(found.give.is_empty() && table.bytes(&found.take) <= 40, "{found:?}");
}

#[test]
fn small_differences_move_nothing() {
    let table = table(4, 8);
    // Three replicas of layers 0 and 1, two of layers 2 and 3.
    let members = [layers(0..2, 8), layers(0..2, 8), layers(0..2, 8), layers(2..4, 8), layers(2..4, 8)];
    let view = view(&table, &members);
    for own in &members {
        assert_eq!(rebalance(&view, own, 160, 1), None);
    }
}

#[test]
fn a_member_waits_for_its_turn_and_then_moves() {
    let table = table(4, 8);
    let own = layers(0..3, 8);
    let view = view(&table, &[own.clone(), own.clone(), own.clone()]);
    let pace = Pace { interval: Duration::from_secs(30), spacing: Duration::from_secs(10) };
    let mut turns = Turns::new(pace, 5);
    let Step::LookAt(at) = turns.step(&view, &own, 240, Duration::ZERO) else { panic!("not at once") };
    assert!(at < Duration::from_secs(30));
    assert!(matches!(turns.step(&view, &own, 240, at), Step::Move(_)));
}

#[test]
fn few_of_a_thousand_members_move_for_one_opening() {
    let table = table(4, 8);
    let own = layers(0..3, 8);
    let mut lost = view(&table, &vec![own.clone(); 999]);
    lost.add(&set((0..7).map(|expert| (3, expert))), &[], &HostedExperts::new());
    let drawn = (0..1000).filter(|seed| {
        let mut turns = Turns::new(Pace::default(), *seed);
        let Step::LookAt(at) = turns.step(&lost, &own, 240, Duration::ZERO) else { return false };
        matches!(turns.step(&lost, &own, 240, at), Step::Move(_)) && at < Duration::from_secs(10)
    });
    let drawn = drawn.count();
    assert!((1..=16).contains(&drawn), "{drawn} move before others can see the first");
}

/// Lets members that have `budget_bytes` each move until none wants to; gives how many experts were moved.
fn settle(table: &Arc<ExpertTable>, members: &mut [HostedExperts], budget_bytes: u64) -> usize {
    let mut moved = 0;
    for round in 0..1000 {
        let mut calm = true;
        for at in 0..members.len() {
            let view = view(table, members);
            if let Some(found) = rebalance(&view, &members[at], budget_bytes, round * 100 + at as u64) {
                let kept = members[at].iter().filter(|pair| !found.give.contains(pair));
                members[at] = set(kept.chain(found.take.iter().copied()));
                assert!(table.bytes(&members[at].iter().collect::<Vec<_>>()) <= budget_bytes);
                moved += found.take.len();
                calm = false;
            }
        }
        if calm {
            return moved;
        }
    }
    panic!("never calm");
}

#[test]
fn members_with_just_enough_memory_host_everything_twice_again_after_one_has_left() {
    let table = table(6, 16);
    for seed in 0..10 {
        let mut members = Vec::new();
        for member in 0..4 {
            let chosen = choose(&view(&table, &members), &nothing(), 640, seed * 4 + member);
            members.push(set(chosen));
        }
        assert!(view(&table, &members).all_replicas().iter().all(|replicas| *replicas >= 2));
        members.remove(1);
        let moved = settle(&table, &mut members, 640);
        let replicas = view(&table, &members);
        assert!(replicas.all_replicas().iter().all(|replicas| *replicas == 2), "{:?}", replicas.all_replicas());
        assert!(moved <= 64, "{moved} moved where 64 were lost");
        assert_eq!(settle(&table, &mut members, 640), 0, "calm for ever");
    }
}
