//! `hanse node --plan`: what would be hosted and why. Nothing is loaded, announced or written.

use std::path::Path;

use hanse_node::placement::{Reason, explain};
use hanse_node::{VolunteerConfig, preview};
use hanse_protocol::Identity;
use hanse_router::directory::ranges;
use serde::Serialize;

use crate::cli::NodeArgs;
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Plan {
    model_id: String,
    /// Other volunteers of the model that were found.
    members: usize,
    experts: usize,
    expert_bytes: u64,
    layers: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    layer: u32,
    experts: String,
    bytes: u64,
    /// Fewest replicas of these experts, without this node.
    min_replicas: u32,
    /// Demand as a multiple of the average expert's.
    demand: f64,
    why: String,
}

pub(super) async fn run(args: &NodeArgs, data_dir: &Path) -> anyhow::Result<()> {
    // The choice depends on who chooses; a new member would be somebody else each time anyway.
    let key = data_dir.join("identity.key");
    let identity = if key.exists() { Identity::load_or_create(&key)? } else { Identity::generate() };
    let model = super::open(args).await?;
    let (checkpoint, id) = (model.checkpoint(), model.id());
    let config = VolunteerConfig { remote: model.remote().cloned(), ..super::config(args, checkpoint)? };
    let preview = preview(&identity, checkpoint, id, &config).await?;
    let lines = explain(&preview.view, &preview.chosen).into_iter().map(|part| Line {
        layer: part.layer,
        experts: ranges(&part.experts),
        bytes: part.bytes,
        min_replicas: part.replicas,
        demand: (part.demand * 100.0).round() / 100.0,
        why: match part.reason {
            Reason::Missing => "nobody hosts them".to_owned(),
            Reason::Rare => "a single replica: they would be lost with it".to_owned(),
            Reason::Wanted => "more wanted than others".to_owned(),
            Reason::Spare => "memory is left".to_owned(),
        },
    });
    let plan = Plan {
        model_id: id.to_string(),
        members: preview.view.members(),
        experts: preview.chosen.len(),
        expert_bytes: preview.view.table().bytes(&preview.chosen),
        layers: lines.collect(),
    };
    if args.json {
        return output::json(&plan);
    }
    let mut table = output::table(&["layer", "experts", "size", "replicas", "demand", "why"]);
    for line in &plan.layers {
        table.add_row([
            line.layer.to_string(),
            line.experts.clone(),
            output::bytes(line.bytes),
            line.min_replicas.to_string(),
            format!("{:.2}", line.demand),
            line.why.clone(),
        ]);
    }
    say!("{table}");
    say!("{} experts, {}; {} other volunteers", plan.experts, output::bytes(plan.expert_bytes), plan.members);
    Ok(())
}
