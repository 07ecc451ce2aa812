//! How texts are cut up before pairs of tokens are merged, by the name that GGUF files give it in `tokenizer.ggml.pre`.
//!
//! Source: `src/llama-vocab.cpp` of llama.cpp. Where a comment there has the expression of the model's own `tokenizer.json`, it is
//! that one.

use super::super::error::GgufError;

/// A way to cut up texts.
#[derive(Debug)]
pub(super) struct Pre {
    pub(super) names: &'static [&'static str],
    /// Each cuts up what those before it left.
    pub(super) regexes: &'static [&'static str],
    /// A piece that is a token is that token, whatever merges would make of it.
    pub(super) ignore_merges: bool,
    /// Texts begin with the bos token unless the file says otherwise.
    pub(super) add_bos: bool,
    /// Characters are composed first.
    pub(super) nfc: bool,
}

const PLAIN: Pre = Pre { names: &[], regexes: &[], ignore_merges: false, add_bos: false, nfc: false };

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI_K2: &str = r"\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Letters of scripts that have two cases.
const CASED: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

const PRES: &[Pre] = &[
    Pre { names: &["default"], regexes: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN },
    Pre { names: &["gpt-2"], regexes: &[GPT2], ..PLAIN },
    Pre { names: &["olmo"], regexes: &[GPT2], nfc: true, ..PLAIN },
    Pre { names: &["smollm", "starcoder", "refact", "command-r"], regexes: &[r"\p{N}", GPT2], ..PLAIN },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        regexes: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Pre { names: &["dbrx", "smaug-bpe"], regexes: &[LLAMA3], ..PLAIN },
    Pre { names: &["qwen2", "deepseek-r1-qwen"], regexes: &[QWEN2], nfc: true, ..PLAIN },
    Pre { names: &["tekken"], regexes: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN },
    Pre { names: &["gpt-4o"], regexes: &[GPT4O], ..PLAIN },
    // Where pieces are merged as tiktoken does, those that are tokens are left alone.
    Pre { names: &["kimi-k2"], regexes: &[KIMI_K2], ignore_merges: true, ..PLAIN },
    Pre {
        names: &["deepseek-llm"],
        regexes: &["[\r\n]", CASED, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+"],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-v3"],
        regexes: &[
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        regexes: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
        ..PLAIN
    },
];

/// The one of this name; without a name the default, as in llama.cpp.
pub(super) fn find(name: Option<&str>) -> Result<&'static Pre, GgufError> {
    let name = name.unwrap_or("default");
    PRES.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = PRES.iter().flat_map(|pre| pre.names.iter().copied()).collect();
        let found = name.chars().take(80).collect();
        GgufError::Vocabulary { key: "tokenizer.ggml.pre", found, known: known.join(", ") }
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

    use super::*;

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        for regex in find(Some(name)).unwrap().regexes {
            let pattern = SplitPattern::Regex((*regex).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
            split.pre_tokenize(&mut pieces).unwrap();
        }
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    #[test]
    fn every_way_is_understood_and_loses_nothing() {
        let text = "It's 漢字かなWord漢x 12345 THEY'RE\n\n go! ...ß naïve  end ";
        for name in PRES.iter().flat_map(|pre| pre.names) {
            assert_eq!(cut(name, text).concat(), text, "{name}");
        }
        // As the libraries `regex` and `tokenizers` of Python cut it with these expressions.
        let kimi = [
            "It's",
            " ",
            "漢字",
            "かなWord",
            "漢",
            "x",
            " ",
            "123",
            "45",
            " THEY'RE",
            "\n\n",
            " go",
            "!",
            " ...",
            "ß",
            " naïve",
            " ",
            " end",
            " ",
        ];
        assert_eq!(cut("kimi-k2", text), kimi);
        // What is taken for punctuation has the letters of ASCII, so that ï is by itself.
        let deepseek = [
            "It",
            "'",
            "s",
            " ",
            "漢字かな",
            "Word",
            "漢",
            "x",
            " ",
            "12345",
            " THEY",
            "'",
            "RE",
            "\n",
            "\n",
            " go",
            "!",
            " ...",
            "ß",
            " na",
            "ï",
            "ve",
            " ",
            " end",
            " ",
        ];
        assert_eq!(cut("deepseek-llm", text), deepseek);
    }
}
