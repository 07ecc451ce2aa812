//! Ending a text where a stop string appears, although the string may come in pieces.

/// Watches streamed text for stop strings. What may be the beginning of one is held back.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What [`StopStrings::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that may be shown.
    pub text: String,
    /// A stop string was found: `text` ends before it, and nothing more will come.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for `stops`; empty ones are left out.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text and gives what may be shown by now.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped {
            return StopOutput { text: String::new(), stopped: true };
        }
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return StopOutput { text: std::mem::take(&mut self.held), stopped: true };
        }
        let held = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        StopOutput { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text has ended: gives what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`, but not all of it: what has to be held back until more of the text
/// tells whether it becomes one.
pub fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).rev().find(|at| text.ends_with(&stop[..*at])).unwrap_or(0)
}
