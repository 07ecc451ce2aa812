//! What the commands that use a model share: make a client, read the prompt.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use hanse_model::Checkpoint;
use hanse_model::compute_pool;
use hanse_protocol::Identity;
use hanse_router::{Client, EngineConfig, LocalFallback, Resident};

use crate::cli::{ClientArgs, DraftArgs, FallbackKind};
use crate::model::{Model, ModelRef};
use crate::output;

/// A client that computes the experts here, or on the network that `args` name, and drafts as `draft` says.
pub(crate) async fn open(args: &ClientArgs, draft: Option<&DraftArgs>, local: bool) -> anyhow::Result<Client> {
    // Before anything is fetched or anybody is looked for.
    let device = args.device.clone();
    let card = tokio::task::spawn_blocking(move || device.open_for_trunk()).await??;
    let mut client = open_plain(args, draft, local).await?;
    if let Some(card) = card {
        let spinner = output::spinner("copying the trunk to the card");
        let placed = tokio::task::spawn_blocking(move || client.with_trunk_on(&card)).await;
        spinner.finish_and_clear();
        client = placed??;
    }
    let Some(draft) = draft else { return Ok(client) };
    let mut client = client.with_engine(EngineConfig { drafts: draft.drafts(), ..EngineConfig::default() });
    if draft.uses_head() {
        client = tokio::task::spawn_blocking(move || client.with_draft_head()).await??;
    }
    let Some(dir) = draft.draft_model.clone() else { return Ok(client) };
    let with_model = move || anyhow::Ok(client.with_draft_model(&Checkpoint::open(&dir)?)?);
    tokio::task::spawn_blocking(with_model).await?
}

async fn open_plain(args: &ClientArgs, draft: Option<&DraftArgs>, local: bool) -> anyhow::Result<Client> {
    if args.fallback == FallbackKind::Local && !matches!(args.model, ModelRef::Folder(_)) {
        crate::cli::usage_error(
            "--fallback local computes from a model folder, and --model names none: give the folder, or --fallback fetch",
        );
    }
    let mut network = args.network_config();
    let model = Model::open(&args.model, &network, &args.cache).await?;
    let (checkpoint, threads) = (model.checkpoint().clone(), args.threads);
    if draft.is_some_and(DraftArgs::uses_head) {
        // Before anything is fetched or anybody is looked for.
        checkpoint.check_draft_head().context("--draft mtp")?;
    }
    if local {
        return Ok(tokio::task::spawn_blocking(move || Client::local_with(&checkpoint, threads)).await??);
    }
    model.fetch_trunk().await?;
    match args.fallback {
        // From a folder, or from a checkpoint that fetches what is loaded from it.
        FallbackKind::Local | FallbackKind::Fetch => {
            let pool = Arc::new(compute_pool(args.threads)?);
            network.fallback = Some(Arc::new(LocalFallback::new(checkpoint.clone(), pool)));
        }
        FallbackKind::None => {}
    }
    let resident = draft.and_then(|draft| draft.resident);
    if let Some(size) = resident {
        let (checkpoint, pool) = (checkpoint.clone(), Arc::new(compute_pool(args.threads)?));
        let spinner = output::spinner("loading experts to hold");
        let load = move || Resident::load(checkpoint, pool, size.as_u64());
        let loaded = tokio::task::spawn_blocking(load).await?;
        spinner.finish_and_clear();
        network.resident = Some(Arc::new(loaded?));
    }
    // Clients have a new identity each time: volunteers cannot tell one client's visits from another's.
    let identity = Identity::generate();
    let spinner = output::spinner("looking for peers");
    let client = Client::connect_with(&checkpoint, threads, model.id(), &identity, network).await;
    spinner.finish_and_clear();
    // Not before all of the trunk is loaded: what is damaged in the cache is fetched again.
    if let (FallbackKind::None, None, Some(remote)) = (args.fallback, resident, model.remote()) {
        remote.close().await;
    }
    Ok(client?)
}

/// The prompt's token ids, from text or as given.
pub(crate) fn prompt_ids(client: &Client, text: Option<&str>, ids: Option<&[u32]>) -> anyhow::Result<Vec<u32>> {
    match (text, ids) {
        (_, Some(ids)) => Ok(ids.to_vec()),
        (Some(text), None) => {
            let tokenizer = client.tokenizer().context("the model folder has no tokenizer.json: give --prompt-ids")?;
            Ok(tokenizer.encode(text, true)?)
        }
        (None, None) => bail!("no prompt given"),
    }
}

/// A file's text, within a size that a prompt can have.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    const LONGEST: u64 = 64 << 20;
    let cannot = || format!("cannot read {}", path.display());
    let mut text = String::new();
    // Not by the size that the file system tells: a device has none.
    let file = std::fs::File::open(path).with_context(cannot)?;
    std::io::Read::read_to_string(&mut std::io::Read::take(file, LONGEST + 1), &mut text).with_context(cannot)?;
    if text.len() as u64 > LONGEST {
        bail!("{} is too long: a text may have at most {LONGEST} bytes", path.display());
    }
    Ok(text)
}
