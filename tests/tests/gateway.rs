//! The gateway as programs see it that speak OpenAI's language.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use hanse_model::SamplingParams;
use hanse_router::gateway::{GatewayApp, GatewayConfig, Keys, serve};
use hanse_router::{Client, EngineConfig, GenerateRequest};
use hanse_tests::net::{eventually, model_config, runtime};
use hanse_tests::reference::tiny_moe;
use serde_json::{Value, json};

/// A gateway in this process, and a client of the same model beside it.
struct Served {
    address: SocketAddr,
    client: Client,
    http: reqwest::Client,
    end: tokio::sync::oneshot::Sender<()>,
    served: tokio::task::JoinHandle<()>,
}

async fn start(engine: EngineConfig, config: GatewayConfig) -> Served {
    let client = Client::local(&model_config(&tiny_moe())).unwrap().with_engine(engine);
    let app = GatewayApp::new(client.clone(), config).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        serve(listener, app, async { drop(ended.await) }).await.unwrap();
    });
    let http = reqwest::Client::builder().pool_max_idle_per_host(0).build().unwrap();
    Served { address, client, http, end, served }
}

async fn ordinary() -> Served {
    start(EngineConfig::default(), GatewayConfig::new("tiny-moe")).await
}

impl Served {
    fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("http://{}{path}", self.address));
        request.header("content-type", "application/json").body(body.to_string())
    }

    async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(format!("http://{}{path}", self.address)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// The data of each server-sent event.
    async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let response = self.post(path, body).send().await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// What `hanse generate` gives.
    async fn text(&self, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> String {
        let prompt = self.client.tokenizer().unwrap().encode(prompt, true).unwrap();
        let request = GenerateRequest { prompt, max_tokens, sampling, ..GenerateRequest::default() };
        let mut generation = self.client.generate(request);
        let mut text = String::new();
        while let Some(token) = generation.next().await {
            text += &token.unwrap().text;
        }
        text + &generation.summary().unwrap().rest
    }
}

fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}

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
fn what_makes_no_sense_is_refused_in_openais_words_and_others_are_served_meanwhile() {
    runtime().block_on(async {
        let served = ordinary().await;
        let chat = |more: Value| {
            let mut body = json!({ "model": "tiny-moe", "messages": user("Hi"), "max_tokens": 4 });
            more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
            body
        };
        let long = "fox ".repeat(2000);
        for (body, status, code, param) in [
            (chat(json!({ "model": "gpt-9" })), 404, json!("model_not_found"), json!("model")),
            (chat(json!({ "messages": [] })), 400, Value::Null, json!("messages")),
            (chat(json!({ "messages": [{ "role": "pirate", "content": "Arr" }] })), 400, Value::Null, json!("messages[0].role")),
            (chat(json!({ "messages": [{ "role": "user", "content": 7 }] })), 400, Value::Null, json!("messages[0].content")),
            (chat(json!({ "messages": user(&long) })), 400, json!("context_length_exceeded"), json!("messages")),
            (chat(json!({ "temperature": -1 })), 400, Value::Null, json!("temperature")),
            (chat(json!({ "temperature": "hot" })), 400, Value::Null, json!("temperature")),
            (chat(json!({ "top_p": 1.5 })), 400, Value::Null, json!("top_p")),
            (chat(json!({ "n": 1_000_000 })), 400, Value::Null, json!("n")),
            (chat(json!({ "n": -1 })), 400, Value::Null, json!("n")),
            (chat(json!({ "max_tokens": 0 })), 400, Value::Null, json!("max_tokens")),
            (chat(json!({ "logit_bias": { "fox": 1 } })), 400, Value::Null, json!("logit_bias")),
            (chat(json!({ "logprobs": true, "top_logprobs": 99 })), 400, Value::Null, json!("top_logprobs")),
            (chat(json!({ "stop": vec!["a"; 27] })), 400, Value::Null, json!("stop")),
            (chat(json!({ "tool_choice": "required" })), 400, Value::Null, json!("tool_choice")),
            (
                chat(json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "type": "nonsense" } } } })),
                400,
                Value::Null,
                json!("response_format"),
            ),
        ] {
            let (found, document) = served.ask("/v1/chat/completions", &body).await;
            let error = &document["error"];
            assert_eq!((found, &error["code"], &error["param"]), (status, &code, &param), "{document}");
            assert!(error["message"].as_str().unwrap().len() > 10 && error["type"].is_string(), "{document}");
        }
        for raw in ["", "{", "[]", "{\"model\": \"tiny-moe\"} trailing", "\u{0}"] {
            let request = served.http.post(format!("http://{}/v1/chat/completions", served.address));
            let response = request.body(raw).send().await.unwrap();
            assert_eq!(response.status(), 400, "{raw:?}");
            assert!(response.text().await.unwrap().contains("invalid_request_error"));
        }
        let tokens = json!({ "model": "tiny-moe", "prompt": [1, 2, 99_999_999], "max_tokens": 4 });
        assert_eq!(served.ask("/v1/completions", &tokens).await.0, 400);
        assert_eq!(served.get("/v1/nothing").await.0, 404);
        assert_eq!(served.get("/v1/completions").await.0, 405);
        let large = json!({ "model": "tiny-moe", "prompt": "x".repeat(10 << 20) });
        assert_eq!(served.ask("/v1/completions", &large).await.0, 413);
        // A client that does not look before it has sent everything.
        let (address, large) = (served.address, large.to_string());
        let answer = tokio::task::spawn_blocking(move || {
            let mut socket = std::net::TcpStream::connect(address).unwrap();
            let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", large.len());
            socket.write_all(&[head.as_bytes(), large.as_bytes()].concat()).unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(answer.await.unwrap().starts_with("HTTP/1.1 413"));
        assert_eq!(served.ask("/v1/chat/completions", &chat(json!({}))).await.0, 200);
        assert!(served.get("/metrics").await.1.contains("hanse_responses_total{route=\"/v1/chat/completions\",status=\"400\"}"));
        assert_eq!(served.get("/health").await, (200, r#"{"status":"ok"}"#.to_owned()));
        let models: Value = serde_json::from_str(&served.get("/v1/models").await.1).unwrap();
        assert_eq!(models["data"][0]["id"], "tiny-moe");
        assert_eq!(served.get("/v1/models/tiny-moe").await.0, 200);
        assert_eq!(served.get("/v1/models/gpt-9").await.0, 404);
    });
}

#[test]
fn only_who_has_a_key_may_ask() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("keys"), "sesame\n").unwrap();
        let keys = Some(Keys::load(&dir.path().join("keys")).unwrap());
        let served = start(EngineConfig::default(), GatewayConfig { keys, ..GatewayConfig::new("tiny-moe") }).await;
        let body = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 2 });
        let (status, document) = served.ask("/v1/completions", &body).await;
        assert_eq!((status, &document["error"]["code"]), (401, &json!("invalid_api_key")));
        let with = |key: &'static str| served.post("/v1/completions", &body).header("authorization", key).send();
        assert_eq!(with("Bearer wrong").await.unwrap().status(), 401);
        assert_eq!(with("sesame").await.unwrap().status(), 401);
        assert_eq!(with("Bearer sesame").await.unwrap().status(), 200);
        assert_eq!(served.get("/health").await.0, 200, "whoever watches over it needs no key");
    });
}

#[test]
fn when_it_is_full_more_are_told_to_come_back() {
    runtime().block_on(async {
        let engine = EngineConfig { max_sequences: 1, max_waiting: 1, ..EngineConfig::default() };
        let served = start(engine, GatewayConfig::new("tiny-moe")).await;
        let body = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 400, "ignore_eos": true });
        let asked = (0..8).map(|_| served.post("/v1/completions", &body).send());
        let responses = join_all(asked).await;
        let refused: Vec<_> = responses.into_iter().map(Result::unwrap).filter(|r| r.status() == 429).collect();
        assert!(!refused.is_empty() && refused.len() <= 6, "{}", refused.len());
        assert_eq!(refused[0].headers()["retry-after"], "1");
    });
}

#[test]
fn a_client_that_goes_away_ends_its_generation() {
    runtime().block_on(async {
        let served = ordinary().await;
        for stream in [true, false] {
            let before = served.client.engine().tokens;
            let body = json!({ "model": "tiny-moe", "prompt": PROMPT, "max_tokens": 450, "stream": stream,
                "logit_bias": { "0": -100 } });
            let mut socket = std::net::TcpStream::connect(served.address).unwrap();
            let body = body.to_string();
            write!(socket, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                .unwrap();
            eventually("it runs", || served.client.engine().tokens > before + 3).await;
            drop(socket);
            eventually("it has ended", || served.client.engine().running == 0).await;
            assert!(served.client.engine().tokens < before + 440, "stream {stream}: {:?}", served.client.engine());
        }
    });
}

#[test]
fn whoever_sends_slowly_is_cut_off_and_holds_up_nobody() {
    runtime().block_on(async {
        let config = GatewayConfig { body_timeout: Duration::from_secs(1), ..GatewayConfig::new("tiny-moe") };
        let served = start(EngineConfig::default(), config).await;
        let mut slow: Vec<_> = (0..50).map(|_| std::net::TcpStream::connect(served.address).unwrap()).collect();
        for socket in &mut slow {
            socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").unwrap();
        }
        let body = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 2 });
        assert_eq!(served.ask("/v1/completions", &body).await.0, 200);
        let answer = tokio::task::spawn_blocking(move || {
            let mut answer = String::new();
            slow[0].set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            slow[0].read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(answer.await.unwrap().starts_with("HTTP/1.1 408"));
    });
}

#[test]
fn a_gateway_that_is_told_to_end_finishes_what_is_in_flight() {
    runtime().block_on(async {
        let served = ordinary().await;
        let body = json!({ "model": "tiny-moe", "prompt": PROMPT, "max_tokens": 200, "logit_bias": { "0": -100 } });
        let asked = tokio::spawn(served.post("/v1/completions", &body).send());
        eventually("it runs", || served.client.engine().tokens > 3).await;
        let Served { end, served, address, .. } = served;
        end.send(()).unwrap();
        let response = asked.await.unwrap().unwrap();
        let document: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
        assert_eq!(document["usage"]["completion_tokens"], 200);
        let began = Instant::now();
        served.await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
        assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens any more");
    });
}
