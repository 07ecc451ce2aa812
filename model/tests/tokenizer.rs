//! Tokenizer, streaming and chat templates against the reference's cases.

mod common;

use std::path::Path;

use common::{fixture, json, tiny_moe};
use hanse_model::{ChatMessage, GenerationDefaults, GenerationDefaultsError, Tokenizer, TokenizerError};
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
    tokenizer.chat_template().unwrap().render(&[user], true).map_err(|error| error.to_string())
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
fn streaming_bytes_that_are_no_text_gives_what_decoding_gives() {
    let tokenizer = Tokenizer::load(&fixture("olmoe")).unwrap();
    let mut state = 1u32;
    for _ in 0..200 {
        let tokens: Vec<u32> = (0..40)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) % 440
            })
            .collect();
        let mut stream = tokenizer.stream(true);
        let mut text: String = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
        text.push_str(&stream.finish().unwrap());
        assert_eq!(text, tokenizer.decode(&tokens, true).unwrap());
    }
}

#[test]
fn conversations_render_and_encode_as_in_the_reference() {
    for (tokenizer, golden) in cases() {
        for case in golden["chat"].as_array().unwrap() {
            let template = tokenizer.chat_template().unwrap();
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
    assert_eq!(tokenizer.chat_template().unwrap().render(&[], false).unwrap(), "<e>!");
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
    assert!(matches!(Tokenizer::load(dir.path()), Err(TokenizerError::Config { .. })));
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(matches!(Tokenizer::load(dir.path()), Err(TokenizerError::Config { .. })));
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
