//! Where the lines of a conversation come from: a terminal, where they can be edited and called back, or a pipe.

use std::io::{BufRead, IsTerminal, Read};

use anyhow::Context as _;
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::signals::Interrupts;

const PROMPT: &str = "> ";
/// The longest line that is read from a pipe.
const LONGEST_LINE: u64 = 1 << 20;

/// Reads lines.
#[derive(Debug)]
pub(super) enum Lines {
    /// The editor is away while a line is being read.
    Terminal(Option<Box<DefaultEditor>>),
    Pipe,
}

impl Lines {
    pub(super) fn open() -> anyhow::Result<Self> {
        if !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
            return Ok(Self::Pipe);
        }
        let mut editor = DefaultEditor::with_config(Config::default()).context("cannot use the terminal")?;
        editor.set_auto_add_history(true);
        Ok(Self::Terminal(Some(Box::new(editor))))
    }

    /// The next line; `None` at the end, which ctrl-C and ctrl-D are too. A dropped future leaves a thread that reads one line more.
    pub(super) async fn next(&mut self, interrupts: &mut Interrupts) -> anyhow::Result<Option<String>> {
        match self {
            Self::Terminal(place) => {
                let Some(mut editor) = place.take() else { return Ok(None) };
                let reading = move || (editor.readline(PROMPT), editor);
                let (line, editor) = tokio::task::spawn_blocking(reading).await?;
                *place = Some(editor);
                match line {
                    Ok(line) => Ok(Some(line)),
                    Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                    Err(error) => Err(error).context("cannot read from the terminal"),
                }
            }
            Self::Pipe => {
                let reading = tokio::task::spawn_blocking(read_line);
                tokio::select! {
                    line = reading => line?,
                    () = interrupts.next() => Ok(None),
                }
            }
        }
    }
}

fn read_line() -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let read = std::io::stdin().lock().take(LONGEST_LINE + 1).read_until(b'\n', &mut line);
    let read = read.context("cannot read standard input")?;
    anyhow::ensure!(read as u64 <= LONGEST_LINE, "a line may have at most {LONGEST_LINE} bytes");
    Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
}
