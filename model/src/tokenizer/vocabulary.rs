//! What each token stands for, in bytes.

use std::collections::HashMap;

use serde_json::Value;

use super::Tokenizer;

/// What one token stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VocabularyToken {
    /// The bytes that it adds to a text; a part of a character perhaps. Of a special token, how it is written.
    pub bytes: Vec<u8>,
    /// Whether it is a mark for the model rather than text.
    pub special: bool,
}

/// How a tokenizer writes bytes into its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Writing {
    /// Every byte is a printable character, as GPT-2 had it.
    ByteLevel,
    /// Text with `▁` for a space, and `<0x0A>` for a byte that is no character of the vocabulary.
    Pieces,
    /// As it is.
    Plain,
}

impl Tokenizer {
    /// What each token stands for, by its number; numbers that no token has stand for nothing.
    pub fn vocabulary(&self) -> Vec<VocabularyToken> {
        let writing = writing(self);
        let tokens = self.inner.get_vocab(true);
        let count = tokens.values().max().map_or(0, |largest| *largest as usize + 1);
        let added = self.inner.get_added_tokens_decoder();
        let byte_of: HashMap<char, u8> = (0..=255u8).map(|byte| (printable(byte), byte)).collect();
        let mut vocabulary = vec![VocabularyToken::default(); count];
        for (text, id) in tokens {
            let Some(slot) = vocabulary.get_mut(id as usize) else { continue };
            *slot = match added.get(&id) {
                Some(token) => VocabularyToken { bytes: text.into_bytes(), special: token.special },
                None => VocabularyToken { bytes: bytes(&text, writing, &byte_of), special: false },
            };
        }
        vocabulary
    }
}

fn writing(tokenizer: &Tokenizer) -> Writing {
    // The library shows its decoders in no other way.
    let decoder = serde_json::to_value(tokenizer.inner.get_decoder()).unwrap_or(Value::Null);
    let mut kinds = Vec::new();
    collect_kinds(&decoder, &mut kinds);
    let any = |names: &[&str]| kinds.iter().any(|kind| names.contains(&kind.as_str()));
    if any(&["ByteLevel"]) {
        Writing::ByteLevel
    } else if any(&["ByteFallback", "Metaspace"]) {
        Writing::Pieces
    } else {
        Writing::Plain
    }
}

fn collect_kinds(value: &Value, into: &mut Vec<String>) {
    into.extend(value["type"].as_str().map(str::to_owned));
    value["decoders"].as_array().into_iter().flatten().for_each(|decoder| collect_kinds(decoder, into));
}

fn bytes(text: &str, writing: Writing, byte_of: &HashMap<char, u8>) -> Vec<u8> {
    match writing {
        Writing::Plain => text.as_bytes().to_vec(),
        Writing::Pieces => match single_byte(text) {
            Some(byte) => vec![byte],
            None => text.replace('\u{2581}', " ").into_bytes(),
        },
        Writing::ByteLevel => {
            let mut bytes = Vec::with_capacity(text.len());
            for letter in text.chars() {
                match byte_of.get(&letter) {
                    Some(byte) => bytes.push(*byte),
                    None => bytes.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
            bytes
        }
    }
}

/// The byte that `<0x0A>` stands for.
fn single_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's printable character for a byte: itself where it is one, else the next of U+0100 and up.
fn printable(byte: u8) -> char {
    let is_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_itself(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|earlier| !is_itself(*earlier)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_from_every_way_of_writing_them() {
        let byte_of: HashMap<char, u8> = (0..=255u8).map(|byte| (printable(byte), byte)).collect();
        assert_eq!(byte_of.len(), 256, "each has its own");
        assert_eq!(bytes("Ġthe", Writing::ByteLevel, &byte_of), b" the");
        assert_eq!(bytes("Ċ", Writing::ByteLevel, &byte_of), b"\n");
        assert_eq!(bytes("Ã¼", Writing::ByteLevel, &byte_of), "ü".as_bytes());
        assert_eq!(bytes("▁the", Writing::Pieces, &byte_of), b" the");
        assert_eq!(bytes("<0x0A>", Writing::Pieces, &byte_of), b"\n");
        assert_eq!(bytes("<0xZZ>", Writing::Pieces, &byte_of), b"<0xZZ>");
        assert_eq!(bytes("<0x€>", Writing::Pieces, &byte_of), "<0x€>".as_bytes());
        assert_eq!(bytes("##ing", Writing::Plain, &byte_of), b"##ing");
    }
}
