//! What is shown as an example is understood.

use clap::{Command, CommandFactory};

use super::super::Cli;

/// A peer's id, where an example has one cut short.
const PEER: &str = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo";

/// The commands of a shell's lines, as words: quotes hold words together, a backslash at a line's end joins it to the next.
fn commands(text: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word) = (Vec::new(), Vec::new(), None::<String>);
    let mut quoted = false;
    for c in text.replace("\\\n", " ").chars().chain(['\n']) {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            c if quoted || !(c.is_whitespace() || "|&>".contains(c)) => word.get_or_insert_default().push(c),
            c => {
                words.extend(word.take());
                if "\n|&>".contains(c) && !words.is_empty() {
                    commands.push(std::mem::take(&mut words));
                }
            }
        }
    }
    assert!(!quoted, "a quote is not closed: {text}");
    commands
}

/// Asserts that the program understands a command line.
fn is_understood(words: &[String]) {
    // Other things of the reader's own, such as DIR, are names that any file may have.
    let told = |word: &String| match word.as_str() {
        "ADDR" | "ADDR2" => format!("/ip4/192.0.2.7/udp/4001/quic-v1/p2p/{PEER}"),
        _ => word.replace("12D3...", PEER),
    };
    if let Err(error) = Cli::command().try_get_matches_from(words.iter().map(told)) {
        panic!("{words:?}: {error}");
    }
}

/// Asserts that a command and those below it show examples of their own, which are understood.
fn has_examples(command: &Command, path: &str) {
    let shown = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (_, examples) = shown.split_once(":\n").unwrap_or_else(|| panic!("{path} shows no examples"));
    for line in examples.lines() {
        assert!(line.chars().count() <= 80, "{path}: this would be torn apart: {line:?}");
    }
    // What the root says of each command stands beside it.
    let examples: String =
        examples.lines().map(|line| line.trim().split("  ").next().unwrap_or("").to_owned() + "\n").collect();
    let (mut own, begins) = (0, format!("{path} "));
    for words in commands(&examples).iter().filter(|words| words[0] == "hanse") {
        is_understood(words);
        own += usize::from((words.join(" ") + " ").starts_with(&begins));
    }
    assert!(own > 0, "{path} is not among its examples");
    for below in command.get_subcommands() {
        has_examples(below, &format!("{path} {}", below.get_name()));
    }
}

#[test]
fn each_command_shows_examples_that_it_understands() {
    has_examples(&Cli::command(), "hanse");
}

#[test]
fn a_line_of_a_shell_is_taken_apart_as_a_shell_does() {
    let words = |command: &[&str]| command.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let lines = "echo 'a | b' | hanse x \\\n  --y ''\nhanse z > file && hanse";
    let expected = [
        words(&["echo", "a | b"]),
        words(&["hanse", "x", "--y", ""]),
        words(&["hanse", "z"]),
        words(&["file"]),
        words(&["hanse"]),
    ];
    assert_eq!(commands(lines), expected);
}

/// The services that the documentation shows are verified as such by `node/tests/binary/services.rs`.
#[test]
fn the_commands_of_documented_services_are_understood() {
    for page in
        [include_str!("../../../../docs/run-a-volunteer.md"), include_str!("../../../../docs/operate-a-gateway.md")]
    {
        let (_, command) = page.split_once("ExecStart=").expect("a service");
        let command = commands(command).remove(0);
        let (program, args) = command.split_first().expect("a command");
        assert_eq!(program, "/usr/local/bin/hanse");
        is_understood(&[&["hanse".to_owned()], args].concat());
    }
}
