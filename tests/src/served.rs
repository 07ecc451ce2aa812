//! A gateway in this process, asked by HTTP.

use std::net::SocketAddr;

use futures::StreamExt;
use hanse_model::SamplingParams;
use hanse_router::gateway::{GatewayApp, GatewayConfig, serve};
use hanse_router::{Client, EngineConfig, GenerateRequest};
use serde_json::{Value, json};

use crate::net::model_config;
use crate::reference::tiny_moe;

/// A gateway in this process, and its client.
#[derive(Debug)]
pub struct Served {
    /// Where it serves.
    pub address: SocketAddr,
    /// What it asks.
    pub client: Client,
    /// Asks it; every request has a connection of its own.
    pub http: reqwest::Client,
    /// Tells it to end.
    pub end: tokio::sync::oneshot::Sender<()>,
    /// Has ended when it has.
    pub served: tokio::task::JoinHandle<()>,
}

/// A gateway of the bundled model, all in this process.
pub async fn start(engine: EngineConfig, config: GatewayConfig) -> Served {
    before(Client::local(&model_config(&tiny_moe())).unwrap().with_engine(engine), config).await
}

/// A gateway before a client.
pub async fn before(client: Client, config: GatewayConfig) -> Served {
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

/// A gateway of the bundled model with nothing special about it.
pub async fn ordinary() -> Served {
    start(EngineConfig::default(), GatewayConfig::new("tiny-moe")).await
}

impl Served {
    /// A request with a body.
    pub fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("http://{}{path}", self.address));
        request.header("content-type", "application/json").body(body.to_string())
    }

    /// The status and the document of an answer.
    pub async fn ask(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.post(path, body).send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap())
    }

    /// The status and the text of an answer to a request without a body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let response = self.http.get(format!("http://{}{path}", self.address)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// The data of each server-sent event.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let response = self.post(path, body).send().await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// What `hanse generate` gives.
    pub async fn text(&self, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> String {
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

/// A chat that begins with `text`.
#[must_use]
pub fn user(text: &str) -> Value {
    json!([{ "role": "user", "content": text }])
}
