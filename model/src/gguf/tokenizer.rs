//! The vocabulary of a GGUF file, as the files that model folders have: `tokenizer.json` and what goes with it.

mod pre;

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::error::GgufError;
use super::metadata::Metadata;
use pre::Pre;

const TOKENS: &str = "tokenizer.ggml.tokens";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const MODEL: &str = "tokenizer.ggml.model";
const TEMPLATE: &str = "tokenizer.chat_template";
/// What stands for a space in vocabularies of the kind `llama`.
const SPACE: char = '▁';
/// Pairs of parts that are looked for in tokens of the kind `llama`: bounds the work that a hostile vocabulary makes.
const MAX_PARTS: usize = 1 << 26;
/// Bytes of a token of the kind `llama`.
const MAX_TOKEN: usize = 4096;

/// Kinds of tokens.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Control tokens that end an answer whatever the file says, as in llama.cpp.
const ENDS: [&str; 10] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|return|>",
    "<|call|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "[EOT]",
];

/// A vocabulary ready to be written.
pub(super) struct Vocabulary<'a> {
    tokenizer: Value,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
    ends: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
    tokens: Vec<&'a str>,
    template: Option<&'a str>,
    kind: String,
}

/// What the file says of its tokens.
struct Tokens<'g, 'a> {
    metadata: &'g Metadata<'a>,
    texts: &'g [&'a str],
    kinds: Option<&'g [i64]>,
}

impl Tokens<'_, '_> {
    fn kind(&self, token: usize) -> i64 {
        self.kinds.and_then(|kinds| kinds.get(token)).copied().unwrap_or(1)
    }

    fn of_kind(&self, wanted: &'static [i64]) -> impl Iterator<Item = (usize, &str)> {
        self.texts.iter().copied().enumerate().filter(move |(token, _)| wanted.contains(&self.kind(*token)))
    }

    /// Tokens that are found in a text before it is cut up.
    fn added(&self) -> Vec<Value> {
        self.of_kind(&[UNKNOWN, CONTROL, USER_DEFINED])
            .filter(|(_, text)| !text.is_empty())
            .map(|(token, text)| {
                json!({
                    "id": token,
                    "content": text,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": self.kind(token) != USER_DEFINED,
                })
            })
            .collect()
    }

    /// A token that the file names by its number.
    fn special(&self, name: &str, default: Option<u32>) -> Result<Option<u32>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(token) = self.metadata.whole(&key)? else {
            return Ok(default.filter(|token| (*token as usize) < self.texts.len()));
        };
        let within = u32::try_from(token).ok().filter(|token| (*token as usize) < self.texts.len());
        let outside = || self.metadata.invalid(&key, format!("there are {} tokens", self.texts.len()));
        within.map(Some).ok_or_else(outside)
    }
}

/// Reads the vocabulary.
pub(super) fn read<'a>(metadata: &Metadata<'a>) -> Result<Vocabulary<'a>, GgufError> {
    let missing = |key: &str| GgufError::MissingKey { key: key.to_owned() };
    let model = metadata.text(MODEL)?.ok_or_else(|| missing(MODEL))?;
    let texts = metadata.texts(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
    let kinds = metadata.numbers("tokenizer.ggml.token_type")?;
    if kinds.is_some_and(|kinds| kinds.len() != texts.len()) {
        return Err(metadata.invalid("tokenizer.ggml.token_type", format!("there are {} tokens", texts.len())));
    }
    let mut numbers = HashMap::with_capacity(texts.len());
    for (token, text) in texts.iter().enumerate() {
        if numbers.insert(*text, token).is_some() {
            let text: String = text.chars().take(80).collect();
            return Err(metadata.invalid(TOKENS, format!("{text:?} is there twice")));
        }
    }
    let tokens = Tokens { metadata, texts, kinds };
    // bos, eos, unknown; whether a text begins with bos.
    let (defaults, begins, parts, kind) = match model {
        "gpt2" => {
            let pre = pre::find(metadata.text("tokenizer.ggml.pre")?)?;
            let parts = byte_level(&tokens, &numbers, pre)?;
            ([None; 3], pre.add_bos, parts, format!("gpt2, {}", pre.names[0]))
        }
        "llama" => ([Some(1), Some(2), Some(0)], true, sentence_piece(&tokens, &numbers)?, "llama".to_owned()),
        other => {
            let found = other.chars().take(80).collect();
            return Err(GgufError::Vocabulary { key: MODEL, found, known: "gpt2, llama".to_owned() });
        }
    };
    let (bos, eos) = (tokens.special("bos", defaults[0])?, tokens.special("eos", defaults[1])?);
    let (unknown, padding) = (tokens.special("unknown", defaults[2])?, tokens.special("padding", None)?);
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(begins) && bos.is_some();
    let add_eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false) && eos.is_some();
    let mut ends = Vec::new();
    let named = [eos, tokens.special("eot", None)?, tokens.special("eom", None)?];
    let by_text = tokens.of_kind(&[CONTROL]).filter(|(_, text)| ENDS.contains(text)).map(|(token, _)| token as u32);
    for token in named.into_iter().flatten().chain(by_text) {
        if !ends.contains(&token) {
            ends.push(token);
        }
    }
    let Parts { normalizer, pre_tokenizer, decoder, model } = parts;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": around(texts, bos.filter(|_| add_bos), eos.filter(|_| add_eos)),
        "decoder": decoder,
        "model": model,
    });
    let template = metadata.text(TEMPLATE)?;
    let tokens = texts.to_vec();
    Ok(Vocabulary { tokenizer, bos, eos, unknown, padding, ends, add_bos, add_eos, tokens, template, kind })
}

impl Vocabulary<'_> {
    /// Tokens in it.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn kind(&self) -> String {
        self.kind.clone()
    }

    pub(super) fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Puts the tokens that begin and end texts into a `config.json`.
    pub(super) fn tokens_of_config(&self, config: &mut Map<String, Value>) {
        for (key, token) in [("bos_token_id", self.bos), ("eos_token_id", self.eos), ("pad_token_id", self.padding)] {
            if let Some(token) = token {
                config.insert(key.to_owned(), token.into());
            }
        }
    }

    /// Names and contents of the files.
    pub(super) fn files(&self) -> [(&'static str, String); 3] {
        let text = |token: Option<u32>| token.and_then(|token| self.tokens.get(token as usize));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "bos_token": text(self.bos),
            "eos_token": text(self.eos),
            "unk_token": text(self.unknown),
            "pad_token": text(self.padding),
        });
        if let Some(template) = self.template {
            config["chat_template"] = template.into();
        }
        let mut generation = Map::new();
        self.tokens_of_config(&mut generation);
        if !self.ends.is_empty() {
            generation.insert("eos_token_id".to_owned(), json!(self.ends));
        }
        [
            ("tokenizer.json", format!("{}\n", self.tokenizer)),
            ("tokenizer_config.json", format!("{config:#}\n")),
            ("generation_config.json", format!("{:#}\n", Value::Object(generation))),
        ]
    }
}

/// What differs between kinds of tokenizers.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

/// Byte-level BPE, as GPT-2 has it.
fn byte_level(tokens: &Tokens<'_, '_>, numbers: &HashMap<&str, usize>, pre: &Pre) -> Result<Parts, GgufError> {
    let missing = || GgufError::MissingKey { key: MERGES.to_owned() };
    let merges = tokens.metadata.texts(MERGES)?.ok_or_else(missing)?;
    let merges: Vec<[&str; 2]> = merges
        .iter()
        .map(|merge| {
            // The first character may be a space itself.
            let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
            let parts = at.map(|at| [&merge[..at], &merge[at + 1..]]);
            parts.ok_or_else(|| tokens.metadata.invalid(MERGES, format!("{merge:?} is not two parts")))
        })
        .collect::<Result<_, _>>()?;
    let split = |regex: &&str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let mut steps: Vec<Value> = pre.regexes.iter().map(split).collect();
    steps.push(json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false }));
    let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    Ok(Parts {
        normalizer: if pre.nfc { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder,
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": ordered(numbers),
            "merges": merges,
        }),
    })
}

/// SentencePiece's BPE with bytes for what has no token. Its merges follow from the scores of the tokens.
fn sentence_piece(tokens: &Tokens<'_, '_>, numbers: &HashMap<&str, usize>) -> Result<Parts, GgufError> {
    let missing = || GgufError::MissingKey { key: SCORES.to_owned() };
    let scores = tokens.metadata.floats(SCORES)?.ok_or_else(missing)?;
    if scores.len() != tokens.texts.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(tokens
            .metadata
            .invalid(SCORES, format!("it must be a number for each of {} tokens", tokens.texts.len())));
    }
    let too_long = || tokens.metadata.invalid(TOKENS, format!("tokens have at most {MAX_TOKEN} bytes"));
    let mut merges = Vec::new();
    let mut looked_at = 0;
    for (text, score) in tokens.texts.iter().zip(scores) {
        looked_at += text.len();
        if text.len() > MAX_TOKEN || looked_at > MAX_PARTS {
            return Err(too_long());
        }
        let mut parts: Vec<_> = text
            .char_indices()
            .skip(1)
            .map(|(at, _)| text.split_at(at))
            .filter_map(|(left, right)| Some(([left, right], (numbers.get(left)?, numbers.get(right)?))))
            .collect();
        parts.sort_by_key(|(_, numbers)| *numbers);
        merges.extend(parts.into_iter().map(|(parts, _)| (parts, *score)));
    }
    // As the converter of transformers orders them: better scores first, then longer parts.
    let lengths = |parts: &[&str; 2]| parts.map(|part| part.chars().count());
    let better = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
    merges.sort_by(|a, b| better(a.1, b.1).then_with(|| lengths(&b.0).cmp(&lengths(&a.0))));
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(parts, _)| parts).collect();
    let prefix = tokens.metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let space = SPACE.to_string();
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": space }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.push(json!({ "type": "Prepend", "prepend": space }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": space }));
    let unknown = tokens.of_kind(&[UNKNOWN]).next().map(|(_, text)| text);
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": ordered(numbers),
            "merges": merges,
        }),
    })
}

/// In one order, whoever imports the file: the model's id depends on it.
fn ordered<'a>(numbers: &HashMap<&'a str, usize>) -> BTreeMap<&'a str, usize> {
    numbers.iter().map(|(text, token)| (*text, *token)).collect()
}

/// What puts tokens around a text.
fn around(texts: &[&str], bos: Option<u32>, eos: Option<u32>) -> Value {
    let mut special = Map::new();
    let mut piece = |token: Option<u32>, kind: u8| {
        let token = token?;
        let text = *texts.get(token as usize)?;
        special.insert(text.to_owned(), json!({ "id": text, "ids": [token], "tokens": [text] }));
        Some(json!({ "SpecialToken": { "id": text, "type_id": kind } }))
    };
    let mut template = |kind: u8| {
        let sequence = if kind == 0 { "A" } else { "B" };
        let text = json!({ "Sequence": { "id": sequence, "type_id": kind } });
        [piece(bos, kind), Some(text), piece(eos, kind)].into_iter().flatten().collect::<Vec<_>>()
    };
    let (single, mut pair) = (template(0), template(0));
    pair.append(&mut template(1));
    if special.is_empty() {
        return Value::Null;
    }
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special })
}
