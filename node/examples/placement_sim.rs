//! A thousand volunteers over a simulated day: `cargo run --release -p hanse-node --example placement_sim`.
//!
//! `-- MEMBERS HOURS SEED` changes the size. The numbers in `docs/benchmarks.md` come from here.

use std::time::{Duration, Instant};

use hanse_node::simulation::{Report, Scenario, World};

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u64>().unwrap_or_else(|_| panic!("{arg}: a number")));
    let mut next = |default| args.next().unwrap_or(default);
    let (members, hours, seed) = (next(1000) as usize, next(24), next(1));
    let hour = Duration::from_secs(3600);
    let started = Instant::now();
    let mut world = World::new(Scenario { members, seed, ..Scenario::default() });
    world.run(2 * hour);
    show("the first two hours", &world.report());
    world.measure_from_now();
    world.run(hour * hours as u32 / 2);
    world.shift_demand();
    world.run(hour * hours as u32 / 2);
    show("the day after, demand shifts at half time", &world.report());
    world.end_churn();
    world.run(3 * hour);
    world.measure_from_now();
    world.run(hour);
    show("an hour of peace, three hours after the last one came or went", &world.report());
    println!("simulated in {:.0?}", started.elapsed());
}

fn show(what: &str, report: &Report) {
    println!("{what}: {:.1} h", report.time.as_secs_f64() / 3600.0);
    println!("  online now {} with memory for {:.2} copies of the model", report.online, report.capacity);
    println!("  every expert covered {:.3} % of the time, twice {:.3} %", report.covered * 100.0, report.safe * 100.0);
    let (least, median, most) = report.replicas;
    println!(
        "  replicas now {:?}; least ever sampled {least}, median {median:.1}, most {most:.1}",
        report.replicas_now
    );
    println!(
        "  {} moves of {} experts, {} called off: {:.3} moves per member and hour",
        report.moves, report.moved_experts, report.called_off, report.moves_per_member_hour
    );
    println!("  fetched {:.2} GiB per member and hour", report.fetched_per_member_hour / f64::from(1 << 30));
    let (row, batch) = (report.peers_per_layer, report.peers_per_layer_batch);
    println!("  peers per layer: {:.2} (most {}) for a row, {:.2} (most {}) for 16", row.0, row.1, batch.0, batch.1);
    println!("  advert {:.0} bytes (most {})", report.advert_bytes.0, report.advert_bytes.1);
    println!("  provider keys {:.1} (most {})", report.keys.0, report.keys.1);
    println!("  slowest plan {:.1?}", report.slowest_plan);
}
