//! What the gateway refuses, how much it takes, and how it ends.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use futures::future::join_all;
use hanse_router::EngineConfig;
use hanse_router::gateway::{GatewayConfig, Keys};
use hanse_tests::net::{PATIENCE, eventually, runtime};
use hanse_tests::served::{Served, ordinary, start, user};
use serde_json::{Value, json};

const PROMPT: &str = "Once upon a time, there was a little fox";

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
            (chat(json!({ "n": 0 })), 400, Value::Null, json!("n")),
            (chat(json!({ "messages": user("") })), 400, Value::Null, json!("messages")),
            (chat(json!({ "logit_bias": { "1000000": 1 } })), 400, Value::Null, json!("logit_bias")),
            (chat(json!({ "top_logprobs": 3 })), 400, Value::Null, json!("top_logprobs")),
            (chat(json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "$ref": "#" } } } })), 400, Value::Null,
                json!("response_format")),
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
            let message = error["message"].as_str().unwrap();
            assert!(message.len() > 10 && !message.contains(['\n', '<']) && error["type"].is_string(), "{document}");
        }
        for (more, param, code) in [
            (json!({ "prompt": [] }), "prompt", Value::Null),
            (json!({ "prompt": [[]] }), "prompt", Value::Null),
            (json!({ "prompt": "" }), "prompt", Value::Null),
            (json!({ "prompt": long }), "prompt", json!("context_length_exceeded")),
            (json!({ "prompt": [1, 2, 99_999_999] }), "prompt", Value::Null),
            (json!({ "prompt": "Hi", "logprobs": 21 }), "logprobs", Value::Null),
            (json!({ "prompt": vec!["Hi"; 40], "n": 2 }), "n", Value::Null),
        ] {
            let mut body = json!({ "model": "tiny-moe", "max_tokens": 4 });
            more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
            let (status, document) = served.ask("/v1/completions", &body).await;
            let error = &document["error"];
            assert_eq!((status, &error["param"], &error["code"]), (400, &json!(param), &code), "{document}");
        }
        for raw in ["", "{", "[]", "{\"model\": \"tiny-moe\"} trailing", "\u{0}"] {
            let request = served.http.post(format!("http://{}/v1/chat/completions", served.address));
            let response = request.body(raw).send().await.unwrap();
            assert_eq!(response.status(), 400, "{raw:?}");
            let document: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
            assert_eq!(document["error"]["type"], "invalid_request_error");
            assert!(document["error"]["param"].is_null() || raw == "[]", "{raw:?}: {document}");
        }
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
        let body = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 400, "logit_bias": { "0": -100 } });
        let asked = (0..8).map(|_| served.post("/v1/completions", &body).send());
        let responses = join_all(asked).await;
        let refused: Vec<_> = responses.into_iter().map(Result::unwrap).filter(|r| r.status() == 429).collect();
        assert_eq!(refused.len(), 6);
        assert_eq!(refused[0].headers()["retry-after"], "1");
        let never = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 2, "n": 3 });
        let (status, document) = served.ask("/v1/completions", &never).await;
        assert_eq!((status, &document["error"]["param"]), (400, &json!("n")), "it would never fit");
        for _ in 0..20 {
            let (status, _) = served
                .ask("/v1/completions", &json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 2, "n": 2 }))
                .await;
            assert_eq!(status, 200, "whoever has been answered leaves room at once");
        }
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

#[test]
fn large_bodies_share_room_and_small_ones_need_none() {
    runtime().block_on(async {
        let config = GatewayConfig { max_body_bytes: 100 << 10, ..GatewayConfig::new("tiny-moe") };
        let served = start(EngineConfig::default(), config).await;
        let large = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 1, "user": "x".repeat(90 << 10) });
        assert_eq!(served.ask("/v1/completions", &large).await.0, 200);
        // Eight may be read at a time.
        let half = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{{{}",
            100 << 10,
            " ".repeat(50 << 10)
        );
        let mut held: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(served.address).unwrap()).collect();
        held.iter_mut().for_each(|socket| socket.write_all(half.as_bytes()).unwrap());
        let deadline = Instant::now() + PATIENCE;
        let refused = loop {
            let response = served.post("/v1/completions", &large).send().await.unwrap();
            if response.status() != 200 {
                break response;
            }
            assert!(Instant::now() < deadline);
        };
        assert_eq!(refused.status(), 429);
        assert_eq!(refused.headers()["retry-after"], "1");
        let small = json!({ "model": "tiny-moe", "prompt": "Hi", "max_tokens": 1 });
        assert_eq!(served.ask("/v1/completions", &small).await.0, 200);
        drop(held);
        while served.ask("/v1/completions", &large).await.0 != 200 {
            assert!(Instant::now() < deadline);
        }
    });
}

#[test]
fn pages_of_other_origins_may_ask_only_where_the_operator_says_so() {
    runtime().block_on(async {
        let asks = async |served: &Served, origin: &str| {
            let url = format!("http://{}/v1/chat/completions", served.address);
            let preflight = served.http.request(reqwest::Method::OPTIONS, url).header("origin", origin);
            let preflight = preflight.header("access-control-request-method", "POST");
            let preflight = preflight.header("access-control-request-headers", "authorization,content-type");
            let body = json!({ "model": "tiny-moe", "messages": user("Hi"), "max_tokens": 1 });
            let asked = served.post("/v1/chat/completions", &body).header("origin", origin);
            let answers = [preflight.send().await.unwrap(), asked.send().await.unwrap()];
            answers.map(|answer| {
                answer.headers().get("access-control-allow-origin").map(|value| value.to_str().unwrap().to_owned())
            })
        };
        let (ours, others) = ("https://ours.example", "https://others.example");
        let served = ordinary().await;
        assert_eq!(asks(&served, ours).await, [None, None], "off by default");
        let config = GatewayConfig { cors_origins: vec![ours.to_owned()], ..GatewayConfig::new("tiny-moe") };
        let served = start(EngineConfig::default(), config).await;
        assert_eq!(asks(&served, ours).await, [Some(ours.to_owned()), Some(ours.to_owned())]);
        assert_eq!(asks(&served, others).await, [None, None]);
    });
}
