//! The one binary with all commands: see `hanse --help`.

mod cli;
mod commands;
mod memory;
mod model;
mod output;
mod paths;
mod signals;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use hanse_node::owner::control::Command as Control;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.verbose);
    if let Err(error) = hanse_model::check_isa() {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match runtime(&cli.command) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.spawn(memory::give_back());
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Demo(args) => commands::demo::run(args).await,
            Command::Node(args) => commands::node::run(args).await,
            Command::Pause(args) => commands::pause::run(args, Control::Pause).await,
            Command::Resume(args) => commands::pause::run(args, Control::Resume).await,
            Command::Ready(args) => commands::pause::run(args, Control::Ready).await,
            Command::Gateway(args) => commands::gateway::run(args).await,
            Command::Generate(args) => commands::generate::run(args).await,
            Command::Chat(args) => commands::chat::run(args).await,
            Command::Score(args) => commands::score::run(args).await,
            Command::Status(args) => commands::status::run(args).await,
            Command::Doctor(args) => commands::doctor::run(args).await,
            Command::Inspect(args) => commands::inspect::run(&args),
            Command::Manifest(args) => commands::manifest::run(&args),
            Command::Quantize(args) => commands::quantize::run(&args),
            Command::Carve(args) => commands::carve::run(&args),
            Command::Import(args) => commands::import::run(&args),
            Command::Bench(args) => commands::bench::run(args).await,
            Command::Completions(args) => commands::completions::run(&args),
            Command::Man(args) => commands::man::run(&args),
            #[cfg(unix)]
            Command::Testnet(command) => commands::testnet::run(command).await,
        }
    });
    // A thread that still reads standard input or computes must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough, as with `| head`.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// As many threads as there are cores, or as a volunteer's owner allows: also for what is computed beside experts, as hashes of weights are.
fn runtime(command: &Command) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Command::Node(args) = command
        && let Some(most) = args.limits.max_cores
    {
        builder.worker_threads(most.into());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(most.into());
        pool.build_global().map_err(std::io::Error::other)?;
    }
    builder.enable_all().build()
}

/// Logs go to standard error; `HANSE_LOG` (such as `debug` or `hanse_node=debug`) wins over `-v`.
fn start_logging(verbose: u8) {
    let default = match verbose {
        // libp2p-kad warns when it knows nobody, which is how the first member of a network begins.
        0 => "warn,libp2p_kad=error",
        1 => "warn,hanse_protocol=info,hanse_model=info,hanse_router=info,hanse_node=info,hanse=info",
        2 => "info,hanse_protocol=debug,hanse_router=debug,hanse_node=debug,hanse=debug",
        _ => "debug",
    };
    let filter = std::env::var("HANSE_LOG").unwrap_or_else(|_| default.to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
