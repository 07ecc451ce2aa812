//! `hanse chat`: talk with a model.

mod conversation;
mod lines;

use std::time::Instant;

use anyhow::{Context as _, bail};
use conversation::Conversation;
use futures::StreamExt;
use hanse_model::SamplingParams;
use hanse_router::{Client, FinishReason, GenerateRequest};
use lines::Lines;

use super::client;
use super::generate::{footer, show};
use crate::cli::ChatArgs;
use crate::output::say;
use crate::signals::Interrupts;

const HELP: &str = "\
/help          shows this
/retry         asks the last question again
/reset         forgets the conversation
/system TEXT   tells the model TEXT before the conversation; without TEXT, nothing
/quit          leaves, as ctrl-D does, and ctrl-C where you type; while an answer comes, ctrl-C stops the answer";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Say(&'a str),
    Help,
    Retry,
    Reset,
    System(&'a str),
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn of(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Self::Nothing,
            "/help" => Self::Help,
            "/retry" => Self::Retry,
            "/reset" => Self::Reset,
            "/system" => Self::System(rest.trim()),
            "/quit" => Self::Quit,
            // A path is no command.
            _ if word.strip_prefix('/').is_some_and(|name| name.chars().all(char::is_alphanumeric)) => {
                Self::Unknown(word)
            }
            _ => Self::Say(line),
        }
    }
}

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    if !args.client.local && !args.client.names_network() {
        crate::cli::usage_error("give --bootstrap ADDR to use a network, or --local to compute everything here");
    }
    let client = client::open(&args.client, Some(&args.draft), args.client.local).await?;
    let talked = talk(&client, &args).await;
    client.close().await;
    talked
}

async fn talk(client: &Client, args: &ChatArgs) -> anyhow::Result<()> {
    let tokenizer = client.tokenizer().context("the model folder has no tokenizer.json")?;
    let template = tokenizer.chat_template()?.context("the model has no chat template: use `hanse generate`")?;
    let context = client.context();
    // The answer needs room too, but not so much that the model forgets at once.
    let limit = context.saturating_sub(args.max_tokens.min(context / 4));
    let mut conversation = Conversation::new(args.system.clone());
    let mut interrupts = Interrupts::catch().context("cannot hear ctrl-C")?;
    let mut lines = Lines::open()?;
    let mut seed = args.sampling.seed.unwrap_or_else(rand::random);
    // The last question, if it got no answer.
    let mut unanswered: Option<String> = None;
    // When an answer ended by itself, if it was just now.
    let mut ended: Option<Instant> = None;
    eprintln!("/help shows what you can do here");
    while let Some(line) = lines.next(&mut interrupts, ended.take()).await? {
        let question = match Input::of(&line) {
            Input::Nothing => continue,
            Input::Quit => break,
            Input::Help => {
                eprintln!("{HELP}");
                continue;
            }
            Input::Reset => {
                conversation.reset();
                unanswered = None;
                eprintln!("[a new conversation]");
                continue;
            }
            Input::System(text) => {
                conversation.set_system(text);
                continue;
            }
            Input::Unknown(word) => {
                eprintln!("{word} is not known here: /help shows what is");
                continue;
            }
            Input::Retry => match unanswered.take().or_else(|| conversation.take_last()) {
                Some(question) => {
                    seed = seed.wrapping_add(1);
                    question
                }
                None => {
                    eprintln!("nothing was asked yet");
                    continue;
                }
            },
            Input::Say(text) => text.to_owned(),
        };
        let fitted = conversation
            .fit(&question, limit, |messages| anyhow::Ok(tokenizer.encode(&template.render(messages, true)?, false)?));
        let answered = match fitted {
            Ok((prompt, dropped)) => {
                if dropped > 0 {
                    let turns = if dropped == 1 { "turn was".to_owned() } else { format!("{dropped} turns were") };
                    eprintln!("[the oldest {turns} forgotten: the context has {context} tokens]");
                }
                answer(client, args, seed, prompt, &mut interrupts).await
            }
            Err(error) => Err(error),
        };
        // Whoever stopped it has been heard.
        ended = (!answered.as_ref().is_ok_and(|answer| answer.stopped)).then(Instant::now);
        match answered {
            // Nothing said, nothing to remember.
            Ok(Answer { text, .. }) if text.is_empty() => unanswered = Some(question),
            Ok(Answer { text, .. }) => {
                unanswered = None;
                conversation.answered(question, text);
            }
            Err(error) if crate::output::is_broken_pipe(&error) => return Err(error),
            Err(error) => {
                // The conversation goes on without the turn that failed.
                eprintln!("error: {error:#}");
                unanswered = Some(question);
            }
        }
    }
    Ok(())
}

/// What was said, and whether ctrl-C was its end.
struct Answer {
    text: String,
    stopped: bool,
}

/// Streams one answer; ctrl-C ends it, and what was said until then counts.
async fn answer(
    client: &Client,
    args: &ChatArgs,
    seed: u64,
    prompt: Vec<u32>,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Answer> {
    // One that came as the last answer ended was meant for that.
    interrupts.forget();
    let chosen = &args.sampling;
    let recommended = client.defaults().sampling(seed);
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
            () = interrupts.next() => {
                say!("");
                let told = generation.progress().map(|so_far| footer(count, so_far.timings, &so_far.network, &so_far.drafts));
                eprintln!("[stopped after {}]", told.unwrap_or_else(|| "0 tokens".to_owned()));
                return Ok(Answer { text, stopped: true });
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
    eprintln!("[{}]", footer(count, summary.timings, &summary.network, &summary.drafts));
    if summary.finish_reason == FinishReason::Length {
        let reason = if count >= args.max_tokens { "as long as --max-tokens allows" } else { "the context is full" };
        eprintln!("[cut off: {reason}]");
    }
    Ok(Answer { text, stopped: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_or_is_said() {
        assert_eq!(Input::of("  \t"), Input::Nothing);
        assert_eq!(Input::of(" /quit "), Input::Quit);
        assert_eq!(Input::of("/system  Be brief. "), Input::System("Be brief."));
        assert_eq!(Input::of("/system"), Input::System(""));
        assert_eq!(Input::of("/quitt now"), Input::Unknown("/quitt"));
        assert_eq!(Input::of("/etc/hosts is what?"), Input::Say("/etc/hosts is what?"));
        assert_eq!(Input::of("What is /help?"), Input::Say("What is /help?"));
    }
}
