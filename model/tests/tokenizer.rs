//! Tokenizer, streaming and chat templates against the reference's cases.

mod common;

use std::path::Path;

use common::{fixture, json, tiny_moe};
use hanse_model::{ChatMessage, GenerationDefaults, GenerationDefaultsError, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn cases() -> Vec<(Tokenizer, Value)> {
    ["olmoe", "qwen3_moe"]
        .map(|name| (Tokenizer::load(&fixture(name)).unwrap(), json(&fixture(name).join("tokenizer_golden.json"))))
        .into()
}

fn messages(value: &Value) -> Vec<ChatMessage> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A folder with the tokenizer of a fixture and a `tokenizer_config.json` of one's own.
fn folder(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("olmoe").join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn render(config: &Value) -> Result<String, String> {
    let dir = folder(config);
    let tokenizer = Tokenizer::load(dir.path()).map_err(|error| error.to_string())?;
    let user = ChatMessage { role: "user".into(), content: "a <b> \"c\"".into() };
    let template = tokenizer.chat_template().map_err(|error| error.to_string())?.unwrap();
    template.render(&[user], true).map_err(|error| error.to_string())
}

#[test]
fn texts_encode_and_decode_as_in_the_reference() {
    for (tokenizer, golden) in cases() {
        for case in golden["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let tokens = tokenizer.encode(text, case["add_special_tokens"].as_bool().unwrap()).unwrap();
            assert_eq!(tokens, ids(&case["ids"]), "{text:?}");
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), case["decoded"], "{text:?}");
            assert_eq!(tokenizer.decode(&tokens, true).unwrap(), case["decoded_skip_special"], "{text:?}");
        }
        assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_size_of_tokenizer"].as_u64().unwrap());
    }
}

#[test]
fn streamed_pieces_are_prefixes_that_end_with_whole_characters_and_add_up_to_the_text() {
    for (tokenizer, golden) in cases() {
        for case in golden["decode_prefixes"].as_array().unwrap() {
            let tokens = ids(&case["ids"]);
            let mut stream = tokenizer.stream(false);
            let mut text = String::new();
            for (n, prefix) in case["decoded_prefixes"].as_array().unwrap().iter().enumerate() {
                let prefix = prefix.as_str().unwrap();
                assert_eq!(tokenizer.decode(&tokens[..=n], false).unwrap(), prefix);
                text.push_str(&stream.push(tokens[n]).unwrap());
                if !prefix.ends_with('\u{FFFD}') {
                    assert_eq!(text, prefix, "after {} tokens", n + 1);
                }
                assert!(prefix.starts_with(&text) && !text.contains('\u{FFFD}'), "after {} tokens", n + 1);
            }
            text.push_str(&stream.finish().unwrap());
            assert_eq!(text, tokenizer.decode(&tokens, false).unwrap());
        }
    }
}

#[test]
fn text_that_a_decoder_rewrites_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let vocab = json!({"<0x41>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "x": 4, "y": 5});
    let decoders = json!([{"type": "ByteFallback"}, {"type": "Fuse"}]);
    let tokenizer = json!({
        "version": "1.0",
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "added_tokens": [],
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let streamed = |tokens: &[u32]| {
        let mut stream = tokenizer.stream(true);
        let mut text: String = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
        text.push_str(&stream.finish().unwrap());
        text
    };
    assert_eq!(streamed(&[4, 1, 2, 3, 5]), "x€y");
    // A byte that was a letter by itself is none beside half a character.
    assert_eq!(tokenizer.decode(&[0, 1, 4, 5], true).unwrap(), "\u{FFFD}\u{FFFD}xy");
    assert_eq!(streamed(&[0, 1, 4, 5]), "A\u{FFFD}\u{FFFD}xy");
    assert_eq!(streamed(&[0, 1]), "A\u{FFFD}\u{FFFD}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn streamed_pieces_of_any_tokens_add_up_to_their_text(
        tokens in prop::collection::vec(0u32..460, 0..60),
        name in prop_oneof![Just("olmoe"), Just("qwen3_moe")],
        skip_special_tokens in any::<bool>(),
    ) {
        let tokenizer = Tokenizer::load(&fixture(name)).unwrap();
        let mut stream = tokenizer.stream(skip_special_tokens);
        let mut text: String = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
        text.push_str(&stream.finish().unwrap());
        prop_assert_eq!(text, tokenizer.decode(&tokens, skip_special_tokens).unwrap());
    }
}

#[test]
fn conversations_render_and_encode_as_in_the_reference() {
    for (tokenizer, golden) in cases() {
        for case in golden["chat"].as_array().unwrap() {
            let template = tokenizer.chat_template().unwrap().unwrap();
            let generate = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = template.render(&messages(&case["messages"]), generate).unwrap();
            assert_eq!(rendered, case["rendered"]);
            assert_eq!(tokenizer.encode(&rendered, false).unwrap(), ids(&case["ids"]));
        }
    }
}

#[test]
fn the_bundled_models_prompts_encode_as_in_the_reference() {
    let tokenizer = Tokenizer::load(&tiny_moe()).unwrap();
    for case in json(&tiny_moe().join("golden.json"))["prompts"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap(), true).unwrap(), ids(&case["input_ids"]));
        assert_eq!(tokenizer.decode(&ids(&case["greedy_ids"]), false).unwrap(), case["greedy_text"]);
    }
}

#[test]
fn a_template_may_be_a_file_or_one_of_a_list_and_tokens_may_be_objects() {
    let template = "{{ eos_token }}{{ messages[0].content | tojson }}";
    let eos = json!({"content": "<e>", "lstrip": false});
    let expected = Ok(r#"<e>"a <b> \"c\"""#.to_owned());
    assert_eq!(render(&json!({"eos_token": eos, "chat_template": template})), expected);
    let list = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]);
    assert_eq!(render(&json!({"eos_token": eos, "chat_template": list})), expected);
    let dir = folder(&json!({"eos_token": "<e>", "chat_template": "not this one"}));
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ eos_token }}!\n").unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.chat_template().unwrap().unwrap().render(&[], false).unwrap(), "<e>!");
}

#[test]
fn templates_have_what_transformers_gives_them() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    assert_eq!(render("{{ messages[0]['content'].startswith('a') }}"), Ok("True".into()));
    assert_eq!(render("{{ {'a': [1, 'ü']} | tojson }}"), Ok(r#"{"a": [1, "ü"]}"#.into()));
    assert_eq!(
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
        Ok("01".into())
    );
    assert_eq!(render("{{ strftime_now('%Y')[:1] }}"), Ok("2".into()));
    assert_eq!(
        render("{% if tools %}x{% endif %}{{ bos_token }}{% set ns = namespace(n=1) %}{{ ns.n }}"),
        Ok("1".into())
    );
    assert!(render("{{ raise_exception('roles must alternate') }}").unwrap_err().contains("roles must alternate"));
}

#[test]
fn templates_keep_the_order_of_keys() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    let message = r#"[{"role": "user", "content": "a <b> \"c\""}]"#;
    assert_eq!(render("{{ messages | tojson }}"), Ok(message.into()));
    assert_eq!(render("{% for k, v in messages[0].items() %}{{ k }},{% endfor %}"), Ok("role,content,".into()));
    let dict = "{% set d = {'z': 1, 'a': 2, 'm': 3} %}";
    let each = "{% for k in d %}{{ k }}{% endfor %}{{ d.keys() | join }}{{ d.values() | join }}{{ d | tojson }}";
    assert_eq!(render(&format!("{dict}{each}")), Ok(r#"zamzam123{"z": 1, "a": 2, "m": 3}"#.into()));
    assert_eq!(render(&format!("{dict}{{{{ d }}}}")), Ok("{'z': 1, 'a': 2, 'm': 3}".into()));
    let user = ChatMessage { role: "user".into(), content: "x".into() };
    assert_eq!(serde_json::to_string(&user).unwrap(), r#"{"role":"user","content":"x"}"#);
}

#[test]
fn marks_of_what_was_generated_are_accepted_and_ignored() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    let marked = |open: &str, close: &str| {
        format!("{{% for m in messages %}}<\n  {open}\n{{{{ m.role }}}} \n{close}\n>{{% endfor %}}")
    };
    let plain = |open: &str, close: &str| {
        marked(&open.replace("generation", "if true"), &close.replace("endgeneration", "endif"))
    };
    for (open, close) in [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration -%}"),
        ("{%generation%}", "{%+ endgeneration %}"),
    ] {
        let rendered = render(&marked(open, close));
        assert!(rendered.is_ok() && rendered == render(&plain(open, close)), "{open}: {rendered:?}");
    }
    assert_eq!(render("{{ '{% x' }}{% set generation = 1 %}{{ generation }}"), Ok("{% x1".into()));
}

#[test]
fn a_malformed_template_fails_only_who_asks_for_it() {
    let dir = folder(&json!({"chat_template": "{% if %}"}));
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert!(!tokenizer.encode("a", true).unwrap().is_empty());
    assert!(matches!(tokenizer.chat_template(), Err(TokenizerError::ChatTemplate(_))));
}

#[test]
fn tokens_that_only_special_tokens_map_names_are_rendered() {
    let template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}";
    let dir = folder(&json!({"eos_token": "<e>", "pad_token": null, "chat_template": template}));
    let map = json!({"bos_token": {"content": "<b>"}, "eos_token": "<other>", "pad_token": "<p>"});
    std::fs::write(dir.path().join("special_tokens_map.json"), map.to_string()).unwrap();
    let template = Tokenizer::load(dir.path()).unwrap().chat_template().unwrap().unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "<b>|<e>|");
}

#[test]
fn templates_call_what_python_and_jinja_have() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    let cases = [
        ("{{ 'a,b,c'.rsplit(',', 1) | tojson }}", r#"["a,b", "c"]"#),
        ("{{ ' a  b c '.rsplit(None, 1) | tojson }}{{ ''.rsplit() | tojson }}", r#"["a  b", "c"][]"#),
        ("{{ 'a=b=c'.partition('=') | tojson }}", r#"["a", "=", "b=c"]"#),
        ("{{ 'abc'.rpartition('=') | tojson }}", r#"["", "", "abc"]"#),
        ("{{ 'user: x'.removeprefix('user: ') }}{{ 'x.y'.removesuffix('.z') }}", "xx.y"),
        ("{{ '-7'.zfill(4) }}{{ 'abc'.zfill(2) }}", "-007abc"),
        ("{{ 'äbc'.index('c') }}{{ 'abab'.rindex('a') }}", "22"),
        ("{{ 'STRAßE'.casefold() }}", "strasse"),
        ("{{ '%s-%03d' | format('a', 7) }}", "a-007"),
        ("{{ 'one two three' | wordcount }}", "3"),
        ("{{ 'one two three' | truncate(length=9, leeway=0) }}", "one..."),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}", "aba"),
        ("{% set j = joiner('/') %}{{ j() }}x{{ j() }}y", "x/y"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source), Ok(expected.into()), "{source}");
    }
    assert!(render("{{ 'abc'.index('z') }}").unwrap_err().contains("substring not found"));
    assert!(render("{{ 'abc'.rsplit('') }}").unwrap_err().contains("empty separator"));
    assert!(render("{{ '7'.zfill(99999999999) }}").is_err());
    assert!(render("{{ 'abc'.nothing() }}").is_err());
}

#[test]
fn tojson_takes_the_arguments_that_transformers_gives_it() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    let cases = [
        ("{{ {'b': [1, {}], 'a': []} | tojson(indent=2) }}", "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}"),
        ("{{ [1] | tojson(indent=0) }}{{ [1] | tojson(indent='\t') }}", "[\n1\n][\n\t1\n]"),
        ("{{ {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=true) }}", r#"{"a": {"c": 2, "d": 1}, "b": 1}"#),
        ("{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}", r#"{"b":[1,2]}"#),
        ("{{ 'ü😀<\n' | tojson }}{{ 'ü😀<\n' | tojson(ensure_ascii=true) }}", r#""ü😀<\n""\u00fc\ud83d\ude00<\n""#),
        ("{{ [true, none, 1.5] | tojson(false, 1) }}", "[\n true,\n null,\n 1.5\n]"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source), Ok(expected.into()), "{source}");
    }
    assert!(render("{{ 1 | tojson(nothing=1) }}").is_err());
}

#[test]
fn a_template_that_never_ends_or_eats_memory_is_stopped() {
    let render = |source: &str| render(&json!({"chat_template": source}));
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(render(loops).is_err());
    assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
    assert!(render("{{ 'x' * 9999999999 }}").is_err());
    assert!(render("{% if %}").is_err());
}

#[test]
fn malformed_tokenizer_files_are_refused_by_name() {
    let dir = folder(&json!({"chat_template": 5}));
    let template = || Tokenizer::load(dir.path()).unwrap().chat_template();
    assert!(matches!(template(), Err(TokenizerError::Config { .. })));
    std::fs::write(dir.path().join("special_tokens_map.json"), "[").unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), json!({"chat_template": ""}).to_string()).unwrap();
    assert!(
        matches!(template(), Err(TokenizerError::Config { path, .. }) if path.ends_with("special_tokens_map.json"))
    );
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(matches!(template(), Err(TokenizerError::Config { .. })));
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    assert!(matches!(Tokenizer::load(dir.path()), Err(TokenizerError::Malformed { .. })));
    assert!(matches!(Tokenizer::load(Path::new("/nonexistent")), Err(TokenizerError::Read(_))));
}

#[test]
fn generation_defaults_come_from_both_files() {
    let defaults = GenerationDefaults::load(&tiny_moe()).unwrap();
    assert_eq!(defaults.eos_token_ids, [0]);
    assert!(defaults.do_sample);
    assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.7), Some(40), Some(0.95)));
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(GenerationDefaults::load(dir.path()).unwrap(), GenerationDefaults::default());
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": [3, 4], "bos_token_id": 1}"#).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": null, "top_p": 0.5}"#).unwrap();
    let defaults = GenerationDefaults::load(dir.path()).unwrap();
    assert_eq!((defaults.eos_token_ids, defaults.bos_token_id, defaults.top_p), (vec![3, 4], Some(1), Some(0.5)));
    std::fs::write(dir.path().join("generation_config.json"), r#"{"top_p": 5}"#).unwrap();
    let error = GenerationDefaults::load(dir.path()).unwrap_err();
    assert!(matches!(error, GenerationDefaultsError::Invalid { key: "top_p", .. }), "{error}");
}
