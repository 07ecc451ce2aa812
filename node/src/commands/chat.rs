//! `hanse chat`: talk with a model.

use std::io::{BufRead, Write};

use anyhow::{Context as _, bail};
use futures::StreamExt;
use hanse_model::{ChatMessage, SamplingParams};
use hanse_router::{Client, GenerateRequest};

use super::client;
use super::generate::{footer, show};
use crate::cli::ChatArgs;
use crate::output::say;

const HELP: &str = "/new starts over, /help shows this, /quit (or ctrl-D) leaves; ctrl-C stops an answer";

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    if !args.client.local && !args.client.names_network() {
        crate::cli::usage_error("give --bootstrap ADDR to use a network, or --local to compute everything here");
    }
    let client = client::open(&args.client, args.client.local).await?;
    let tokenizer = client.tokenizer().context("the model folder has no tokenizer.json")?;
    let template = tokenizer.chat_template()?.context("the model has no chat template: use `hanse generate`")?;
    let beginning = || -> Vec<ChatMessage> {
        args.system.iter().map(|text| ChatMessage { role: "system".to_owned(), content: text.clone() }).collect()
    };
    let mut messages = beginning();
    eprintln!("{HELP}");
    while let Some(line) = next_line().await? {
        match line.trim() {
            "" => continue,
            "/quit" => break,
            "/help" => {
                eprintln!("{HELP}");
                continue;
            }
            "/new" => {
                messages = beginning();
                continue;
            }
            text => messages.push(ChatMessage { role: "user".to_owned(), content: text.to_owned() }),
        }
        let prompt = tokenizer.encode(&template.render(&messages, true)?, false)?;
        match answer(&client, &args, prompt).await {
            Ok(text) => messages.push(ChatMessage { role: "assistant".to_owned(), content: text }),
            Err(error) => {
                // The conversation goes on without the turn that failed.
                messages.pop();
                eprintln!("error: {error:#}");
            }
        }
    }
    client.close().await;
    Ok(())
}

async fn next_line() -> anyhow::Result<Option<String>> {
    let reading = tokio::task::spawn_blocking(|| {
        eprint!("> ");
        std::io::stderr().flush()?;
        let mut line = String::new();
        Ok::<_, std::io::Error>((std::io::stdin().lock().read_line(&mut line)? > 0).then_some(line))
    });
    tokio::select! {
        line = reading => Ok(line??),
        // At the prompt ctrl-C leaves, as ctrl-D does.
        _ = tokio::signal::ctrl_c() => Ok(None),
    }
}

/// Streams one answer; ctrl-C ends it, and what was said until then counts.
async fn answer(client: &Client, args: &ChatArgs, prompt: Vec<u32>) -> anyhow::Result<String> {
    let chosen = &args.sampling;
    let recommended = client.defaults().sampling(chosen.seed.unwrap_or_else(rand::random));
    let sampling = SamplingParams {
        temperature: chosen.temperature.unwrap_or(recommended.temperature),
        top_k: chosen.top_k.or(recommended.top_k),
        top_p: chosen.top_p.or(recommended.top_p),
        ..recommended
    };
    let request = GenerateRequest { prompt, max_tokens: args.max_tokens, sampling, ..GenerateRequest::default() };
    let mut generation = client.generate(request);
    let (mut count, mut text) = (0, String::new());
    loop {
        let token = tokio::select! {
            token = generation.next() => token,
            _ = tokio::signal::ctrl_c() => {
                say!("");
                eprintln!("[stopped]");
                return Ok(text);
            }
        };
        let Some(token) = token else { break };
        let token = token?;
        count += 1;
        show(&token.text)?;
        text.push_str(&token.text);
    }
    let Some(summary) = generation.summary() else { bail!("the answer ended without a word") };
    show(&summary.rest)?;
    text.push_str(&summary.rest);
    say!("");
    eprintln!("{}", footer(count, summary));
    Ok(text)
}
