//! Where the lines of a conversation come from: a terminal, where they can be edited and called back, or a pipe.

use std::io::{BufRead, IsTerminal, Read};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::signals::Interrupts;

const PROMPT: &str = "> ";
const HINT: &str = "(ctrl-C again, ctrl-D or /quit ends)";
/// Ctrl-C that comes so soon after an answer has ended was meant for the answer.
const LATE: Duration = Duration::from_secs(1);
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

    /// The next line; `None` at the end, which ctrl-C and ctrl-D are too, but for one ctrl-C at a terminal that comes just after an
    /// answer `ended` by itself. A dropped future leaves a thread that reads one line more.
    pub(super) async fn next(
        &mut self,
        interrupts: &mut Interrupts,
        mut ended: Option<Instant>,
    ) -> anyhow::Result<Option<String>> {
        match self {
            Self::Terminal(place) => loop {
                let Some(mut editor) = place.take() else { return Ok(None) };
                let reading = move || (editor.readline(PROMPT), editor);
                let (line, editor) = tokio::task::spawn_blocking(reading).await?;
                *place = Some(editor);
                match line {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Interrupted) if is_late(ended.take(), Instant::now()) => eprintln!("{HINT}"),
                    Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(None),
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                }
            },
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

/// Whether ctrl-C at `now` was meant for the answer that has ended.
fn is_late(ended: Option<Instant>, now: Instant) -> bool {
    ended.is_some_and(|ended| now.saturating_duration_since(ended) < LATE)
}

fn read_line() -> anyhow::Result<Option<String>> {
    let mut line = Vec::new();
    let read = std::io::stdin().lock().take(LONGEST_LINE + 1).read_until(b'\n', &mut line);
    let read = read.context("cannot read standard input")?;
    anyhow::ensure!(read as u64 <= LONGEST_LINE, "a line may have at most {LONGEST_LINE} bytes");
    Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_c_is_meant_for_an_answer_for_a_second_after_its_end() {
        let ended = Instant::now();
        assert!(is_late(Some(ended), ended + Duration::from_millis(900)));
        assert!(!is_late(Some(ended), ended + Duration::from_secs(1)));
        assert!(!is_late(None, ended));
    }
}
