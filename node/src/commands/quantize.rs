//! `hanse quantize`: write a model folder again with weights in fewer bits.

use hanse_model::{Precision, quantise_folder};
use hanse_router::weights::FILES;
use serde::Serialize;

use crate::cli::QuantizeArgs;
use crate::model::Folder;
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Report {
    path: String,
    bytes: u64,
    bytes_before: u64,
    expert_matrices: usize,
    in_q8_0_instead: usize,
    shards: usize,
    shards_kept: usize,
}

pub(crate) fn run(args: &QuantizeArgs) -> anyhow::Result<()> {
    let source = Folder::open(&args.model)?;
    let (checkpoint, original) = (&source.checkpoint, source.id().to_string());
    let precision = Precision { experts: args.to.into(), trunk: args.trunk.map(Into::into) };
    let bar = output::byte_bar("quantizing");
    let written = quantise_folder(checkpoint, precision, &original, &FILES, &args.out, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let written = written?;
    let sizes = checkpoint.sizes();
    let report = Report {
        path: args.out.display().to_string(),
        bytes: written.bytes,
        bytes_before: sizes.trunk_bytes + sizes.expert_bytes,
        expert_matrices: written.matrices,
        in_q8_0_instead: written.fell_back,
        shards: written.shards,
        shards_kept: written.kept,
    };
    if args.json {
        return output::json(&report);
    }
    let size = |bytes| output::bytes(bytes);
    say!("written   {} ({}, before {})", report.path, size(report.bytes), size(report.bytes_before));
    say!("experts   {} matrices", report.expert_matrices);
    if report.in_q8_0_instead > 0 {
        say!("          {} in q8_0: their rows are no multiples of 256 weights", report.in_q8_0_instead);
    }
    if report.shards_kept > 0 {
        say!("kept      {} of {} shards from an earlier call", report.shards_kept, report.shards);
    }
    Ok(())
}
