//! What people see: progress on standard error, JSON on standard output.

use std::io::Write;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// `println!` that returns an error instead of panicking when standard output is closed or full; with `?` built in.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*))? };
}
pub(crate) use say;

/// Prints a line on standard output: see [`say`].
pub(crate) fn line(text: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

/// Whether standard output was closed by its reader.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.root_cause().downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints one JSON document on standard output.
pub(crate) fn json(document: &impl serde::Serialize) -> anyhow::Result<()> {
    line(format_args!("{}", serde_json::to_string(document)?))
}

fn bar(template: &str, what: &'static str) -> ProgressBar {
    // Drawn on standard error, and only when that is a terminal.
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A progress bar in bytes.
pub(crate) fn byte_bar(what: &'static str) -> ProgressBar {
    bar("{msg} {wide_bar} {bytes}/{total_bytes} {eta}", what)
}

/// A progress bar in things.
pub(crate) fn count_bar(what: &'static str) -> ProgressBar {
    bar("{msg} {wide_bar} {pos}/{len} {eta}", what)
}

/// Says that something goes on whose end is not known.
pub(crate) fn spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    bytesize::ByteSize(count).display().iec().to_string()
}

/// How many there are, such as `1 peer` or `2 peers`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("{number} {noun}") } else { format!("{number} {noun}s") }
}

/// A table without lines that reads well in 80 columns.
pub(crate) fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.iter().copied());
    table
}

/// A peer id short enough for a table, long enough to tell peers apart.
pub(crate) fn short(peer: &hanse_protocol::PeerId) -> String {
    let text = peer.to_string();
    let tail = text.len().saturating_sub(10);
    format!("…{}", &text[tail..])
}
