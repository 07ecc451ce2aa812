//! Conversations: through a pipe, and at a terminal.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::{Node, hanse, home, text, tiny_moe};

fn chat(command: &mut Command, place: &[&str]) {
    command.args(["chat", "--temperature", "0", "--max-tokens", "12", "--model"]).arg(tiny_moe()).args(place);
}

/// What comes of it when `said` comes through a pipe.
fn talk(said: &str, place: &[&str]) -> Output {
    let home = home();
    let mut command = hanse(&home);
    chat(&mut command, place);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(said.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    output
}

#[test]
fn a_conversation_through_a_pipe_answers_each_line() {
    let nodes = Node::halves();
    let address = nodes[0].address();
    let said = "Tell me about a fox.\n\n/help\nAnd then?\n/reset\nTell me about a fox.\n";
    let [there, here] = [&["--bootstrap", &address][..], &["--local"]].map(|place| {
        let output = talk(said, place);
        let stderr = text(&output.stderr);
        assert_eq!(stderr.matches("tokens/s").count(), 3, "{stderr}");
        assert!(!stderr.contains("error") && !stderr.contains('>'), "{stderr}");
        assert_eq!(stderr.contains("2 peers"), place.len() == 2, "{stderr}");
        text(&output.stdout)
    });
    assert_eq!(there, here);
    let output = talk("Tell me about a fox.\n", &["--local"]);
    let alone = text(&output.stdout);
    assert!(here.starts_with(&alone) && here.ends_with(&alone), "/reset forgets: {here:?}");
}

#[test]
fn a_question_is_asked_again_without_its_first_answer() {
    let once = text(&talk("Tell me about a fox.\n", &["--local"]).stdout);
    let twice = talk("/retry\nTell me about a fox.\n/retry\n/nonsense\n/quit\nNever asked.\n", &["--local"]);
    assert_eq!(text(&twice.stdout), once.repeat(2), "the same greedy answer to the same prompt");
    let stderr = text(&twice.stderr);
    assert!(stderr.contains("nothing was asked yet") && stderr.contains("/nonsense is not known"), "{stderr}");
}

#[test]
fn what_the_model_is_told_first_changes_its_answers() {
    let plain = text(&talk("Once upon a time\n", &["--local"]).stdout);
    let told = text(&talk("/system There was a dog named Bo.\nOnce upon a time\n", &["--local"]).stdout);
    let given = text(&talk("Once upon a time\n", &["--local", "--system", "There was a dog named Bo."]).stdout);
    assert_ne!(told, plain);
    assert_eq!(told, given);
    assert_eq!(text(&talk("/system x\n/system\nOnce upon a time\n", &["--local"]).stdout), plain);
}

#[test]
fn a_conversation_longer_than_the_context_goes_on_and_says_what_was_forgotten() {
    // Each turn takes about 120 of 512 tokens.
    let long = "Once upon a time there was a fox named Pip who loved to run and play. ".repeat(6);
    let output = talk(&format!("{long}\n").repeat(8), &["--local"]);
    let stderr = text(&output.stderr);
    assert_eq!(stderr.matches("tokens/s").count(), 8, "{stderr}");
    assert!(stderr.contains("forgotten: the context has 512 tokens") && !stderr.contains("error"), "{stderr}");
    let longer = "Once upon a time there was a fox. ".repeat(200);
    let stderr = text(&talk(&format!("{longer}\nOnce upon a time\n"), &["--local"]).stderr);
    assert!(stderr.contains("leaves no room"), "{stderr}");
    assert_eq!(stderr.matches("tokens/s").count(), 1, "the conversation goes on: {stderr}");
}

/// A terminal made by `script`, with the program in it.
#[cfg(target_os = "linux")]
mod terminal {
    use std::io::{Read, Write};
    use std::process::{Child, ChildStdin, Command, Stdio};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
    use std::time::Instant;

    use tempfile::TempDir;

    use crate::testnet::Up;
    use crate::{PATIENCE, home, tiny_moe, waits_for};

    const CTRL_C: &str = "\x03";
    const UP: &str = "\x1b[A";

    struct Terminal {
        child: Child,
        keys: ChildStdin,
        shown: Receiver<Vec<u8>>,
        screen: String,
        _home: TempDir,
    }

    impl Terminal {
        fn chat(more: &str) -> Self {
            let home = home();
            let program = env!("CARGO_BIN_EXE_hanse");
            let model = tiny_moe();
            // A shell that stays in between would get the ctrl-C too, and end with an error of its own.
            let line = format!("exec {program} chat --temperature 0 --model {} {more}", model.display());
            let mut command = Command::new("script");
            command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
            command.env("HOME", home.path()).env("XDG_CACHE_HOME", home.path()).env("TERM", "xterm");
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let (mut out, keys) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
            let (shows, shown) = sync_channel(64);
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = out.read(&mut buffer) {
                    if shows.send(buffer[..count].to_vec()).is_err() {
                        break;
                    }
                }
            });
            Self { child, keys, shown, screen: String::new(), _home: home }
        }

        fn types(&mut self, keys: &str) {
            self.keys.write_all(keys.as_bytes()).unwrap();
            self.keys.flush().unwrap();
        }

        /// Waits until `text` is shown, and forgets what was shown until then.
        fn shows(&mut self, text: &str) -> String {
            let deadline = Instant::now() + PATIENCE;
            loop {
                if let Some(at) = self.screen.find(text) {
                    let rest = self.screen.split_off(at + text.len());
                    return std::mem::replace(&mut self.screen, rest);
                }
                match self.shown.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(bytes) => self.screen += &String::from_utf8_lossy(&bytes),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                        panic!("{text:?} is not shown: {:?}", self.screen)
                    }
                }
            }
        }

        fn ends(mut self) {
            waits_for("the program ends", || self.child.try_wait().unwrap().is_some());
            self.screen.extend(self.shown.iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()));
            let status = self.child.wait().unwrap();
            assert!(status.success(), "{status}: {:?}", self.screen);
        }
    }

    impl Drop for Terminal {
        fn drop(&mut self) {
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn at_a_terminal_lines_are_edited_and_called_back() {
        let mut terminal = Terminal::chat("--local --max-tokens 8");
        terminal.shows("> ");
        // Backspace takes the x away.
        terminal.types("/rex\x7ftry\r");
        terminal.shows("nothing was asked yet");
        terminal.types("Once upon a time\r");
        terminal.shows("tokens/s");
        terminal.types(&format!("{UP}\r"));
        terminal.shows("tokens/s");
        terminal.types("/quit\r");
        terminal.ends();
    }

    #[test]
    fn ctrl_c_just_after_an_answer_was_meant_for_it_and_the_next_ends_the_program() {
        let mut terminal = Terminal::chat("--local --max-tokens 8");
        terminal.shows("> ");
        terminal.types("Once upon a time\r");
        terminal.shows("tokens/s");
        terminal.shows("> ");
        terminal.types(CTRL_C);
        terminal.shows("(ctrl-C again, ctrl-D or /quit ends)");
        terminal.shows("> ");
        terminal.types(CTRL_C);
        terminal.ends();
    }

    #[test]
    fn ctrl_c_ends_the_program_where_nothing_was_asked() {
        let mut terminal = Terminal::chat("--local --max-tokens 8");
        terminal.shows("> ");
        terminal.types(CTRL_C);
        terminal.ends();
    }

    #[test]
    fn ctrl_c_stops_the_answer_and_at_the_prompt_the_program() {
        // A token takes a tenth of a second at least, so that the answer has not ended when it is stopped.
        let network = Up::start(&["--nodes", "2", "--rtt", "20ms"]);
        let bootstrap = network.ready["bootstrap"].as_str().unwrap();
        let mut terminal = Terminal::chat(&format!("--max-tokens 490 --bootstrap {bootstrap}"));
        terminal.shows("> ");
        terminal.types("Once upon a time\r");
        // The answer has begun.
        terminal.shows("there");
        terminal.types(CTRL_C);
        terminal.shows("[stopped after");
        let told = terminal.shows("]");
        assert!(told.contains("tokens/s, ") && told.contains(" peer") && told.contains(" frames"), "{told}");
        terminal.types("/retry\r");
        terminal.shows("there");
        terminal.types(CTRL_C);
        terminal.shows("[stopped after");
        terminal.shows("> ");
        terminal.types(CTRL_C);
        terminal.ends();
    }
}
