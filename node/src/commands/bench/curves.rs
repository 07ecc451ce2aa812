//! `hanse bench --curves`: how cost grows, with pictures, each with what the law of the design says.
//!
//! `law` predicts, pure, from terms that are measured apart and in the same rounds; a file for each curve measures; `record` asks networks
//! the same rows again without a trunk; `net` starts networks and times generations; `curve` and `chart` show.

mod batch;
mod bytes;
mod chart;
mod context;
mod curve;
mod law;
mod loss;
mod memory;
mod net;
mod prefill;
mod record;
mod round_trip;
mod spread;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use crate::cli::{BenchArgs, CurveName};
use crate::output::{self, say};
use curve::{Curve, Goal};
use net::Setup;

#[derive(Serialize)]
struct Document {
    model: PathBuf,
    rounds: usize,
    max_tokens: usize,
    /// Of the machine over the last minute, before and after; nothing where that is not told.
    load_average: [Option<f64>; 2],
    curves: Vec<Curve>,
    /// What else was seen.
    notes: Vec<String>,
    goals: Vec<Goal>,
}

/// What a part of the work gives.
struct Measured {
    curves: Vec<Curve>,
    /// What else was seen.
    notes: Vec<String>,
    goals: Vec<Goal>,
}

impl Measured {
    fn curve(curve: Curve) -> Self {
        Self { curves: vec![curve], notes: Vec::new(), goals: Vec::new() }
    }
}

pub(super) async fn run(args: &BenchArgs, dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let before = load_average();
    let setup = Setup::new(args)?;
    let (mut curves, mut notes, mut goals) = (Vec::new(), Vec::new(), Vec::new());
    for name in &args.curve {
        let measured = match name {
            CurveName::RoundTrip => round_trip::run(&setup).await?,
            CurveName::Loss => loss::run(&setup).await?,
            CurveName::Peers => spread::peers(&setup).await?,
            CurveName::Replicas => spread::replicas(&setup).await?,
            CurveName::Batch => batch::run(&setup).await?,
            CurveName::Context => context::run(&setup).await?,
            CurveName::Bytes => bytes::run(&setup).await?,
            CurveName::Memory => memory::run(&setup).await?,
            CurveName::Prefill => prefill::run(&setup).await?,
        };
        for curve in &measured.curves {
            let path = dir.join(format!("{}.svg", curve.name));
            std::fs::write(&path, chart::svg(curve)?).with_context(|| format!("cannot write {}", path.display()))?;
        }
        curves.extend(measured.curves);
        notes.extend(measured.notes);
        goals.extend(measured.goals);
    }
    setup.bar.finish_and_clear();
    let document = Document {
        model: setup.dir.clone(),
        rounds: setup.rounds,
        max_tokens: setup.max_tokens,
        load_average: [before, load_average()],
        curves,
        notes,
        goals,
    };
    if args.json { output::json(&document) } else { print_report(&document) }
}

/// Of the last minute.
fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn print_report(document: &Document) -> anyhow::Result<()> {
    let load = document.load_average.map(|load| load.map_or_else(|| "?".to_owned(), |load| load.to_string()));
    say!("{}, {} rounds, load average {} to {}", document.model.display(), document.rounds, load[0], load[1]);
    for curve in &document.curves {
        curve.print()?;
    }
    say!("");
    for note in &document.notes {
        say!("{note}");
    }
    document.goals.iter().try_for_each(Goal::print)
}
