//! Decoding tokens as they come.

use super::{Tokenizer, TokenizerError};

/// Incremental decoding: the pieces, put together, are the decoding of all tokens at once. Only where a decoder rewrites
/// text that has been given out, the pieces have both forms.
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
        let new = after_common(&before, &all);
        if new.is_empty() || new.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(new.to_owned())
    }

    /// No more tokens come: gives what was held back, with U+FFFD for what never became a character.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let (before, all) = self.decode()?;
        self.ids.clear();
        self.given = 0;
        Ok(after_common(&before, &all).to_owned())
    }

    fn decode(&self) -> Result<(String, String), TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special_tokens)?;
        Ok((before, self.tokenizer.decode(&self.ids, self.skip_special_tokens)?))
    }
}

/// The part of `all` that is new. A decoder may write what it gave before in another way, for example a byte that turns
/// out to be no character: then it is the part from the first difference on, so that nothing is lost.
fn after_common<'a>(before: &str, all: &'a str) -> &'a str {
    let common: usize = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &all[common..]
}
