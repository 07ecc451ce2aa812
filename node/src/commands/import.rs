//! `hanse import`: make a model folder of a GGUF file.

use hanse_model::{Checkpoint, StoredDtype, import_gguf};
use serde::Serialize;

use crate::cli::{FloatDtype, ImportArgs};
use crate::output;
use crate::output::say;

#[derive(Serialize)]
struct Report {
    path: String,
    family: &'static str,
    architecture: String,
    name: Option<String>,
    tensors: usize,
    /// Those of them that the model does without.
    left_out: usize,
    /// Bytes of the weights in the file and in the folder.
    bytes_before: u64,
    bytes: u64,
    /// How many tensors had each of the file's types.
    types: std::collections::BTreeMap<&'static str, usize>,
    tokenizer: String,
    chat_template: bool,
}

pub(crate) fn run(args: &ImportArgs) -> anyhow::Result<()> {
    let to = args.to.map(|to| match to {
        FloatDtype::F32 => StoredDtype::F32,
        FloatDtype::F16 => StoredDtype::F16,
        FloatDtype::Bf16 => StoredDtype::Bf16,
    });
    let bar = output::byte_bar("importing");
    let imported = import_gguf(&args.file, to, &args.out, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let imported = imported?;
    let checkpoint = Checkpoint::open(&args.out)?;
    let sizes = checkpoint.sizes();
    let report = Report {
        path: args.out.display().to_string(),
        family: checkpoint.spec().family,
        architecture: imported.architecture,
        name: imported.name,
        tensors: imported.tensors,
        left_out: imported.left_out,
        bytes_before: imported.bytes,
        bytes: sizes.trunk_bytes + sizes.expert_bytes,
        types: imported.types,
        tokenizer: imported.tokenizer,
        chat_template: imported.chat_template,
    };
    if args.json {
        return output::json(&report);
    }
    let types: Vec<String> = report.types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    say!("model      {}", report.name.as_deref().unwrap_or("without a name"));
    say!("family     {} (the file says {})", report.family, report.architecture);
    say!("tensors    {}: {}", report.tensors, types.join(", "));
    if report.left_out > 0 {
        say!("left out   {} tensors that predict further tokens", report.left_out);
    }
    say!("weights    {}, in the file {}", output::bytes(report.bytes), output::bytes(report.bytes_before));
    say!("tokenizer  {}{}", report.tokenizer, if report.chat_template { ", with a chat template" } else { "" });
    say!("written    {}", report.path);
    Ok(())
}
