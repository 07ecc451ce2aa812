//! The gateway as programs see it that speak OpenAI's language: what it answers.

use futures::future::join_all;
use hanse_model::SamplingParams;
use hanse_tests::net::runtime;
use hanse_tests::served::{ordinary, user};
use serde_json::{Value, json};

const PROMPT: &str = "Once upon a time, there was a little fox";

#[test]
fn chat_and_completions_give_what_generate_gives() {
    runtime().block_on(async {
        let served = ordinary().await;
        let greedy = served.text(PROMPT, 30, SamplingParams::greedy()).await;
        let body = json!({ "model": "tiny-moe", "prompt": PROMPT, "max_tokens": 30, "temperature": 0 });
        let (status, document) = served.ask("/v1/completions", &body).await;
        assert_eq!((status, &document["object"]), (200, &json!("text_completion")));
        assert_eq!(document["choices"][0]["text"], greedy);
        assert_eq!(document["usage"]["completion_tokens"], 30);
        assert_eq!(document["choices"][0]["finish_reason"], "length");
        // The bundled model's template is the text itself.
        let body =
            json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_completion_tokens": 30, "temperature": 0 });
        let (status, document) = served.ask("/v1/chat/completions", &body).await;
        assert_eq!((status, &document["object"]), (200, &json!("chat.completion")));
        assert_eq!(document["choices"][0]["message"]["content"], greedy);
        let drawn = SamplingParams { temperature: 0.8, top_p: Some(0.9), seed: 7, ..SamplingParams::default() };
        let body = json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_tokens": 30, "temperature": 0.8,
            "top_p": 0.9, "seed": 7, "n": 3 });
        let (_, document) = served.ask("/v1/chat/completions", &body).await;
        for choice in 0..3u64 {
            let expected = served.text(PROMPT, 30, SamplingParams { seed: 7 + choice, ..drawn.clone() }).await;
            assert_eq!(document["choices"][choice as usize]["message"]["content"], expected);
        }
    });
}

#[test]
fn a_stream_is_the_same_answer_in_pieces() {
    runtime().block_on(async {
        let served = ordinary().await;
        let mut body = json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_tokens": 40, "temperature": 0.7, "seed": 3,
            "logprobs": true, "top_logprobs": 2, "stop": ["xyzzy"] });
        let (_, whole) = served.ask("/v1/chat/completions", &body).await;
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        let events = served.stream("/v1/chat/completions", &body).await;
        assert_eq!(events.last().unwrap(), "[DONE]");
        let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
        assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"]));
        assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
        let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
        assert_eq!(whole["choices"][0]["message"]["content"], pieces.collect::<String>());
        let told = |document: &Value| document["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        let thoughts: Vec<Value> = chunks.iter().flat_map(|chunk| told(&chunk["choices"][0])).collect();
        assert_eq!(told(&whole["choices"][0]), thoughts);
        assert_eq!(thoughts[0]["top_logprobs"].as_array().unwrap().len(), 2);
        let usage = chunks.last().unwrap();
        assert_eq!((&usage["usage"], &usage["choices"]), (&whole["usage"], &json!([])));
        assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["usage"].is_null()));
    });
}

#[test]
fn two_hundred_streams_at_once_give_each_its_own_answer() {
    runtime().block_on(async {
        let served = ordinary().await;
        let prompts: Vec<String> = (0..200).map(|i| format!("{PROMPT} number {i} who")).collect();
        let body = |prompt: &String, seed: usize| {
            json!({ "model": "tiny-moe", "prompt": prompt, "max_tokens": 24, "temperature": 0.9, "seed": seed, "stream": true })
        };
        let asked = prompts.iter().enumerate().map(|(seed, prompt)| {
            let body = body(prompt, seed);
            let served = &served;
            async move { served.stream("/v1/completions", &body).await }
        });
        let answers = join_all(asked).await;
        for (seed, (prompt, events)) in prompts.iter().zip(&answers).enumerate() {
            let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
            let text: String = chunks.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
            let sampling = SamplingParams { temperature: 0.9, seed: seed as u64, ..SamplingParams::default() };
            assert_eq!(text, served.text(prompt, 24, sampling).await, "{prompt}");
        }
    });
}

#[test]
fn a_prompt_is_scored_by_echoing_it() {
    runtime().block_on(async {
        let served = ordinary().await;
        let body = json!({ "model": "tiny-moe", "prompt": PROMPT, "max_tokens": 0, "echo": true, "logprobs": 1 });
        let (status, document) = served.ask("/v1/completions", &body).await;
        assert_eq!(status, 200, "{document}");
        let choice = &document["choices"][0];
        assert_eq!(choice["text"], PROMPT);
        let tokens = served.client.tokenizer().unwrap().encode(PROMPT, true).unwrap();
        let score = served.client.score(tokens, false, |_| ()).await.unwrap();
        let told: Vec<Option<f32>> = choice["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().map(|v| v as f32))
            .collect();
        assert_eq!(told, score.logprobs);
        assert_eq!(
            choice["logprobs"]["text_offset"][1],
            choice["logprobs"]["tokens"][0].as_str().unwrap().chars().count()
        );
        assert_eq!(choice["logprobs"]["top_logprobs"][1].as_object().unwrap().len(), 1);
        assert!(choice["logprobs"]["top_logprobs"][0].is_null());
    });
}

#[test]
fn answers_obey_a_json_schema_and_calls_are_made_of_tools_that_must_be_called() {
    runtime().block_on(async {
        let served = ordinary().await;
        let schema = json!({ "type": "object", "required": ["name", "age", "good"], "additionalProperties": false,
            "properties": { "name": { "type": "string", "maxLength": 12 }, "age": { "type": "integer", "minimum": 0, "maximum": 99 },
                "good": { "type": "boolean" } } });
        for seed in 0..4 {
            let body = json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_tokens": 480, "temperature": 1, "seed": seed, "n": 3,
                "response_format": { "type": "json_schema", "json_schema": { "name": "fox", "schema": schema } } });
            let (status, document) = served.ask("/v1/chat/completions", &body).await;
            assert_eq!(status, 200, "{document}");
            let choices = document["choices"].as_array().unwrap();
            assert_eq!(choices.len(), 3);
            for choice in choices {
                let text = choice["message"]["content"].as_str().unwrap();
                let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert!(value["name"].is_string() && value["good"].is_boolean() && value["age"].as_u64().unwrap() < 100);
                assert_eq!(choice["finish_reason"], "stop");
            }
        }
        let tools = json!([{ "type": "function", "function": { "name": "feed", "description": "Feeds somebody",
            "parameters": { "type": "object", "properties": { "whom": { "enum": ["fox", "owl"] } }, "required": ["whom"],
                "additionalProperties": false } } }]);
        let mut body = json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_tokens": 480, "temperature": 1, "seed": 1,
            "tools": tools, "tool_choice": "required" });
        let (status, document) = served.ask("/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{document}");
        let choice = &document["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        let call = &choice["message"]["tool_calls"][0];
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("feed")));
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["whom"] == "fox" || arguments["whom"] == "owl");
        body["stream"] = true.into();
        let events = served.stream("/v1/chat/completions", &body).await.join("\n");
        assert!(events.contains("\"tool_calls\":[{") && events.contains("\"finish_reason\":\"tool_calls\""), "{events}");
        // A chat goes on after a call.
        let messages = json!([user(PROMPT)[0], choice["message"],
            { "role": "tool", "tool_call_id": call["id"], "content": "done" }]);
        let body = json!({ "model": "tiny-moe", "messages": messages, "max_tokens": 4, "tools": tools });
        assert_eq!(served.ask("/v1/chat/completions", &body).await.0, 200);
    });
}

#[test]
fn penalties_stops_and_plain_json_do_what_they_say() {
    runtime().block_on(async {
        let served = ordinary().await;
        let body = |more: Value| {
            let mut body = json!({ "model": "tiny-moe", "prompt": PROMPT, "max_tokens": 60, "temperature": 0 });
            more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
            body
        };
        let text = async |more: Value| {
            let (status, document) = served.ask("/v1/completions", &body(more)).await;
            assert_eq!(status, 200, "{document}");
            let choice = &document["choices"][0];
            (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
        };
        let (plain, _) = text(json!({})).await;
        for (presence, frequency) in [(1.5, 0.0), (0.0, 1.5)] {
            let (penalised, _) = text(json!({ "presence_penalty": presence, "frequency_penalty": frequency })).await;
            let sampling = SamplingParams {
                presence_penalty: presence,
                frequency_penalty: frequency,
                ..SamplingParams::greedy()
            };
            assert_eq!(penalised, served.text(PROMPT, 60, sampling).await);
            assert_ne!(penalised, plain);
        }
        // A stop text that crosses tokens, whole and streamed.
        let characters: Vec<char> = plain.chars().collect();
        let stop: String = characters[40..49].iter().collect();
        let before = &plain[..plain.find(&stop).unwrap()];
        assert_eq!(text(json!({ "stop": ["xyzzy", stop] })).await, (before.to_owned(), "stop".to_owned()));
        let events = served.stream("/v1/completions", &body(json!({ "stop": stop, "stream": true }))).await;
        let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
        let streamed: String = chunks.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
        assert_eq!(streamed, before);
        for seed in 0..3 {
            let more = json!({ "response_format": { "type": "json_object" }, "temperature": 1, "seed": seed, "max_tokens": 480 });
            // A weak model may write a long text into the object: then it is cut off, and is the beginning of one.
            let (text, reason) = text(more).await;
            assert!(text.trim_start().starts_with('{'), "{text}");
            let parsed = serde_json::from_str::<Value>(&text);
            assert!(parsed.is_ok_and(|value| value.is_object()) || reason == "length", "{reason}: {text}");
        }
    });
}

#[test]
fn tools_that_need_not_be_called_leave_the_answer_free() {
    runtime().block_on(async {
        let served = ordinary().await;
        let tools = json!([{ "type": "function", "function": { "name": "feed", "parameters": { "type": "object" } } }]);
        let plain = served.text(PROMPT, 30, SamplingParams::greedy()).await;
        for choice in ["auto", "none"] {
            let body = json!({ "model": "tiny-moe", "messages": user(PROMPT), "max_tokens": 30, "temperature": 0,
                "tools": tools, "tool_choice": choice });
            let (status, document) = served.ask("/v1/chat/completions", &body).await;
            let answer = &document["choices"][0];
            assert_eq!((status, &answer["finish_reason"]), (200, &json!("length")), "{document}");
            // The bundled model's template does not tell of tools.
            assert_eq!(answer["message"]["content"], plain);
            assert!(answer["message"].get("tool_calls").is_none());
        }
    });
}
