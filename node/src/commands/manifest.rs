//! `hanse manifest`: write a model folder's manifest.

use anyhow::Context as _;
use hanse_model::Checkpoint;
use hanse_protocol::{Identity, MANIFEST_FILE};
use serde::Serialize;

use crate::cli::ManifestArgs;
use crate::{model, output, paths};

#[derive(Serialize)]
struct Report {
    model_id: String,
    publisher: String,
    path: String,
    bytes: usize,
    trunk_tensors: usize,
    experts: usize,
}

pub(crate) fn run(args: &ManifestArgs) -> anyhow::Result<()> {
    let data_dir = args.data_dir.clone().map_or_else(paths::data_dir, Ok)?;
    let publisher = Identity::load_or_create(&data_dir.join("identity.key"))?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let (signed, locations) = model::make_manifest(&checkpoint, &publisher)?;
    let path = args.out.clone().unwrap_or_else(|| args.model.join(MANIFEST_FILE));
    let text = signed.to_json(&locations);
    // Written under another name and moved, so that nobody reads half a manifest.
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, &text)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    let manifest = signed.manifest();
    let report = Report {
        model_id: signed.id().to_string(),
        publisher: publisher.peer_id().to_string(),
        path: path.display().to_string(),
        bytes: text.len(),
        trunk_tensors: manifest.trunk.len(),
        experts: manifest.experts.iter().map(|layer| layer.hashes.len()).sum(),
    };
    if args.json {
        return output::json(&report);
    }
    println!("model     {}", report.model_id);
    println!("signed by {}", report.publisher);
    println!("lists     {} tensors of the trunk, {} experts", report.trunk_tensors, report.experts);
    println!("written   {} ({})", report.path, output::bytes(report.bytes as u64));
    Ok(())
}
