//! `hanse carve`: make slices of a dense model's feed-forward layers.

use hanse_model::{Checkpoint, carve};
use hanse_router::weights::describe;
use serde::Serialize;

use crate::cli::CarveArgs;
use crate::model::Folder;
use crate::output;
use crate::output::say;

/// Small files that are not part of the model and that people want beside it.
const PAPERS: [&str; 5] = ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "README.md"];

#[derive(Serialize)]
struct Report {
    path: String,
    /// The dense model's id.
    from: String,
    layers: usize,
    slices: u16,
    trunk_bytes: u64,
    /// All slices together.
    expert_bytes: u64,
    bytes_per_expert: u64,
}

pub(crate) fn run(args: &CarveArgs) -> anyhow::Result<()> {
    let dense = Folder::open(&args.model)?;
    let from = dense.id().to_string();
    let files: Vec<&str> = describe::FILES.iter().chain(&PAPERS).copied().collect();
    let bar = output::byte_bar("carving");
    let carved = carve(&dense.checkpoint, args.slices.into(), &from, &files, &args.out, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    carved?;
    let checkpoint = Checkpoint::open(&args.out)?;
    let sizes = checkpoint.sizes();
    let report = Report {
        path: args.out.display().to_string(),
        from,
        layers: checkpoint.spec().layers.len(),
        slices: args.slices,
        trunk_bytes: sizes.trunk_bytes,
        expert_bytes: sizes.expert_bytes,
        bytes_per_expert: sizes.bytes_per_expert.first().copied().unwrap_or(0),
    };
    if args.json {
        return output::json(&report);
    }
    say!("carved     {} layers into {} each", report.layers, output::count(report.slices.into(), "slice"));
    say!("trunk      {}: what every client keeps", output::bytes(report.trunk_bytes));
    say!("slices     {}: what volunteers share", output::bytes(report.expert_bytes));
    say!("one slice  {}", output::bytes(report.bytes_per_expert));
    say!("written    {}", report.path);
    Ok(())
}
