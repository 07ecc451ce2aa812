//! Decoding tokens as they come.

use super::{Tokenizer, TokenizerError};

/// Incremental decoding: the pieces, put together, are the decoding of all tokens at once.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    /// Tokens still needed: the last ones given out, which decoders look at to decide about spaces, and those held back.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
}

impl TextStream {
    pub(super) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, ids: Vec::new(), given: 0 }
    }

    /// Takes a token and gives the text that it completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.ids.push(token);
        let (before, all) = self.decode()?;
        match all.strip_prefix(before.as_str()) {
            Some(new) if !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER) => {
                self.ids.drain(..self.given);
                self.given = self.ids.len();
                Ok(new.to_owned())
            }
            _ => Ok(String::new()),
        }
    }

    /// No more tokens come: gives what was held back, with U+FFFD for what never became a character.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let (before, all) = self.decode()?;
        self.ids.clear();
        self.given = 0;
        Ok(all.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }

    fn decode(&self) -> Result<(String, String), TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special_tokens)?;
        Ok((before, self.tokenizer.decode(&self.ids, self.skip_special_tokens)?))
    }
}
