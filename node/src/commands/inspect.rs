//! `hanse inspect`: what a model folder holds.

use hanse_model::Checkpoint;
use serde::Serialize;

use crate::cli::InspectArgs;
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Report {
    family: &'static str,
    layers: usize,
    moe_layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    context: usize,
    /// Routed experts of an MoE layer.
    experts: usize,
    top_k: usize,
    trunk_bytes: u64,
    /// All routed experts together.
    expert_bytes: u64,
    /// One routed expert of the first MoE layer.
    bytes_per_expert: u64,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let (spec, sizes) = (checkpoint.spec(), checkpoint.sizes());
    let first = spec.moe_layers().next();
    let report = Report {
        family: spec.family,
        layers: spec.layers.len(),
        moe_layers: spec.moe_layers().count(),
        hidden_size: spec.hidden_size,
        vocab_size: spec.vocab_size,
        context: spec.max_positions,
        experts: first.map_or(0, |(_, moe)| moe.experts),
        top_k: first.map_or(0, |(_, moe)| moe.top_k),
        trunk_bytes: sizes.trunk_bytes,
        expert_bytes: sizes.expert_bytes,
        bytes_per_expert: first.map_or(0, |(layer, _)| sizes.bytes_per_expert[layer]),
    };
    if args.json {
        return output::json(&report);
    }
    let total = (report.trunk_bytes + report.expert_bytes).max(1);
    let share = 100.0 * report.expert_bytes as f64 / total as f64;
    say!("family        {}", report.family);
    say!("layers        {}, of which {} with experts", report.layers, report.moe_layers);
    say!("hidden size   {}", report.hidden_size);
    say!("vocabulary    {} tokens, context {} tokens", report.vocab_size, report.context);
    say!("experts       {} per layer, {} chosen per token", report.experts, report.top_k);
    say!("trunk         {}: what every client keeps", output::bytes(report.trunk_bytes));
    say!("experts       {} ({share:.1} % of the weights): what volunteers share", output::bytes(report.expert_bytes));
    say!("one expert    {}", output::bytes(report.bytes_per_expert));
    Ok(())
}
