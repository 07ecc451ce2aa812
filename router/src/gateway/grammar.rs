//! Answers that obey a format: JSON schemas and calls of tools, by llguidance.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hanse_model::VocabularyToken;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::body::Tool;
use super::tools::{CALL_BEGINS, CALL_ENDS};
use crate::generate::{Constraint, Grammar};

/// White space between the parts of a document: without a bound, a weak model may go on with it for ever.
const WHITE_SPACE: &str = r"[ \n\t]{0,16}";
/// What a schema may cost: a tenth of the library's own bounds, since it comes from a stranger.
const GRAMMAR_SIZE: usize = 50_000;
const LEXER_FUEL: u64 = 200_000;
const LEXER_STATES: usize = 50_000;

/// Makes grammars for one vocabulary.
#[derive(Debug, Clone)]
pub(super) struct Grammars(Arc<Shared>);

struct Shared {
    vocabulary: Vec<VocabularyToken>,
    end: Option<u32>,
    /// Made when it is first needed: it takes a moment for a large vocabulary.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Grammars({} tokens)", self.vocabulary.len())
    }
}

impl Grammars {
    /// `end` is the token that ends an answer.
    pub(super) fn new(vocabulary: Vec<VocabularyToken>, end: Option<u32>) -> Self {
        Self(Arc::new(Shared { vocabulary, end, factory: OnceLock::new() }))
    }

    /// Answers that are JSON of this schema. Takes seconds for a schema that means harm.
    ///
    /// # Errors
    /// Says what is wrong with the schema, or that it is too large.
    pub(super) fn json(&self, mut schema: Value) -> Result<Arc<dyn Grammar>, String> {
        if let Some(schema) = schema.as_object_mut() {
            schema.insert("x-guidance".into(), json!({ "whitespace_pattern": WHITE_SPACE }));
        }
        self.compile(TopLevelGrammar::from_json_schema(schema))
    }

    /// Answers that are a call of one of these tools. Takes as long as [`json`](Self::json).
    ///
    /// # Errors
    /// As [`json`](Self::json), of the tools' parameters.
    pub(super) fn tool_call(&self, tools: &[&Tool]) -> Result<Arc<dyn Grammar>, String> {
        let call = |tool: &&Tool| {
            let arguments = tool.function.parameters.clone().unwrap_or_else(|| json!({ "type": "object" }));
            json!({
                "type": "object",
                "properties": { "name": { "const": tool.function.name }, "arguments": arguments },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        let calls = json!({
            "anyOf": tools.iter().map(call).collect::<Vec<_>>(),
            "x-guidance": { "whitespace_pattern": WHITE_SPACE },
        });
        let lark = format!("start: \"{CALL_BEGINS}\\n\" call \"\\n{CALL_ENDS}\"\ncall: %json {calls}\n");
        self.compile(TopLevelGrammar::from_lark(lark))
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Arc<dyn Grammar>, String> {
        let matcher = Matcher::new(self.0.factory()?.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(words(error));
        }
        let mut format = Matching(matcher);
        // A schema may be well-formed and yet have no document, which shows at the first token.
        format.allowed()?;
        Ok(Arc::new(Format(Mutex::new(format.0))))
    }
}

impl Shared {
    fn factory(&self) -> Result<&ParserFactory, String> {
        self.factory.get_or_init(|| self.make_factory()).as_ref().map_err(Clone::clone)
    }

    fn make_factory(&self) -> Result<ParserFactory, String> {
        let end = self.end.ok_or("this model has no token that ends an answer")?;
        let bytes = |token: &VocabularyToken| match token.special {
            // The library's mark of tokens that no text becomes.
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.bytes.as_slice()].concat(),
            false => token.bytes.clone(),
        };
        let vocabulary: Vec<Vec<u8>> = self.vocabulary.iter().map(bytes).collect();
        if end as usize >= vocabulary.len() {
            return Err("the token that ends an answer is not in the vocabulary".to_owned());
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocabulary.len() as u32, end), &vocabulary);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(words)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_grammar_size = GRAMMAR_SIZE;
        limits.initial_lexer_fuel = LEXER_FUEL;
        limits.max_lexer_states = LEXER_STATES;
        limits.precompute_large_lexemes = false;
        limits.verbose_errors = false;
        Ok(factory)
    }
}

/// The library's errors as a part of a sentence.
fn words(error: impl std::fmt::Display) -> String {
    match error.to_string().replace("<non-verbose/>", "").split_whitespace().collect::<Vec<_>>().join(" ") {
        nothing if nothing == "NoExtensionBias" => "there is no document that obeys it".to_owned(),
        text => text,
    }
}

/// A format, compiled once for all answers of a request: what each of them begins with.
struct Format(Mutex<Matcher>);

impl std::fmt::Debug for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Format")
    }
}

impl Grammar for Format {
    fn begin(&self) -> Result<Box<dyn Constraint>, String> {
        let matcher = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Box::new(Matching(matcher.deep_clone())))
    }
}

struct Matching(Matcher);

impl Constraint for Matching {
    fn allowed(&mut self) -> Result<Vec<u32>, String> {
        let mask = self.0.compute_mask_or_eos().map_err(words)?;
        Ok(mask.as_slice().to_vec())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.0.is_stopped() {
            return Ok(());
        }
        self.0.consume_token(token).map_err(words)
    }
}
