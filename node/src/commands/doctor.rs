//! `hanse doctor`: whether this machine can take part in a network, and what to do where it cannot.

mod machine;
mod network;

use anyhow::bail;
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::model::{Model, ModelRef};
use crate::output::say;
use crate::{output, paths};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    /// It works, but not as well as it could, or was not looked at.
    Warn,
    /// A node or a client cannot work like this.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    outcome: Outcome,
    found: String,
    /// What to do; `null` where all is well.
    advice: Option<String>,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Ok, found: found.into(), advice: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Warn, found: found.into(), advice: Some(advice.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

#[derive(Serialize)]
struct Document<'a> {
    ok: bool,
    checks: &'a [Check],
}

pub(crate) async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let data_dir = args.data_dir.clone().map_or_else(paths::data_dir, Ok)?;
    let mut checks = Vec::new();
    let mut tell = |check: Check| -> anyhow::Result<()> {
        if !args.json {
            print(&check)?;
        }
        checks.push(check);
        Ok(())
    };
    tell(machine::key(&data_dir))?;
    tell(machine::gpu())?;
    let weights = args.cache.dir()?;
    // Weights of a folder are used where they are.
    let needed = match &args.model {
        Some(ModelRef::Folder(_)) => None,
        _ => args.memory.map(|memory| memory.as_u64()),
    };
    tell(tokio::task::spawn_blocking(move || machine::disk(&weights, needed)).await?)?;
    let spinner = output::spinner("looking at the network");
    let found = network::look(&args, machine::runs(&data_dir)).await;
    spinner.finish_and_clear();
    for check in found {
        tell(check)?;
    }
    if let Some(reference) = &args.model {
        tell(model(reference, &args).await)?;
    }
    let failed = checks.iter().filter(|check| check.outcome == Outcome::Fail).count();
    if args.json {
        output::json(&Document { ok: failed == 0, checks: &checks })?;
    }
    if failed > 0 {
        bail!("{failed} of {} checks failed", checks.len());
    }
    Ok(())
}

/// Whether the model can be opened here.
async fn model(reference: &ModelRef, args: &DoctorArgs) -> Check {
    let network = network::client(&args.join);
    let opened = match Model::open(reference, &network, &args.cache).await {
        Ok(opened) => opened,
        Err(error) => {
            let advice =
                "a folder must hold config.json and *.safetensors; an id is printed by every node that hosts the model";
            return Check::fail("model", format!("{error:#}"), advice);
        }
    };
    let (spec, sizes) = (opened.checkpoint().spec(), opened.checkpoint().sizes());
    let (trunk, experts) = (output::bytes(sizes.trunk_bytes), output::bytes(sizes.expert_bytes));
    let found = format!("{}, trunk {trunk}, experts {experts}, id {}", spec.family, opened.id());
    if let Some(remote) = opened.remote() {
        remote.close().await;
    }
    Check::ok("model", found)
}

fn print(check: &Check) -> anyhow::Result<()> {
    let outcome = match check.outcome {
        Outcome::Ok => "ok",
        Outcome::Warn => "warn",
        Outcome::Fail => "FAIL",
    };
    say!("{outcome:<5} {:<10} {}", check.check, check.found);
    if let Some(advice) = &check.advice {
        say!("{:<16} -> {advice}", "");
    }
    Ok(())
}
