//! What is counted, in the format that Prometheus reads.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::client::{Client, Summary};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Response {
    route: String,
    status: u32,
}

/// Counters of a gateway, and gauges of the client behind it.
#[derive(Debug)]
pub(super) struct Metrics {
    client: Client,
    registry: Registry,
    responses: Family<Response, Counter>,
    prompt_tokens: Counter,
    completion_tokens: Counter,
    first_token: Histogram,
    between_tokens: Histogram,
    gauges: Gauges,
}

/// Set when somebody looks.
#[derive(Debug, Default)]
struct Gauges {
    running: Gauge,
    waiting: Gauge,
    kv_bytes: Gauge,
    peers: Gauge,
    missing: Gauge,
    reused_tokens: Gauge,
    steps: Gauge,
    preemptions: Gauge,
    drafted: Gauge,
    accepted: Gauge,
    frames: Gauge,
    retries: Gauge,
    hedged: Gauge,
    fallbacks: Gauge,
    round_trip: Gauge<f64, AtomicU64>,
}

impl Metrics {
    pub(super) fn new(client: Client) -> Self {
        let mut registry = Registry::with_prefix("hanse");
        let histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let this = Self {
            client,
            responses: Family::default(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            first_token: histogram(),
            between_tokens: histogram(),
            gauges: Gauges::default(),
            registry: Registry::default(),
        };
        registry.register("responses", "Responses by route and status", this.responses.clone());
        registry.register("prompt_tokens", "Tokens of prompts that were answered", this.prompt_tokens.clone());
        registry.register("completion_tokens", "Tokens of answers", this.completion_tokens.clone());
        let seconds = Unit::Seconds;
        let help = "From a request to its first token";
        registry.register_with_unit("time_to_first_token", help, seconds.clone(), this.first_token.clone());
        let help = "Mean time between an answer's tokens";
        registry.register_with_unit("time_per_token", help, seconds.clone(), this.between_tokens.clone());
        let gauges = &this.gauges;
        for (name, help, gauge) in [
            ("sequences_running", "Generations that advance together", &gauges.running),
            ("sequences_waiting", "Requests that wait to join them", &gauges.waiting),
            ("kv_cache_bytes", "Memory of keys and values in use", &gauges.kv_bytes),
            ("peers_connected", "Volunteers that can be called", &gauges.peers),
            ("experts_missing", "Experts that no connected peer hosts", &gauges.missing),
            ("prefix_tokens_reused", "Tokens of prompts that were not computed again", &gauges.reused_tokens),
            ("engine_steps", "Forward passes", &gauges.steps),
            ("engine_preemptions", "Keys and values given up for lack of memory", &gauges.preemptions),
            ("draft_tokens", "Drafted tokens that were verified", &gauges.drafted),
            ("draft_tokens_accepted", "Of which came", &gauges.accepted),
            ("expert_calls", "Frames sent to peers", &gauges.frames),
            ("expert_retries", "Of which because another one failed", &gauges.retries),
            ("expert_hedges", "Of which because another one was late", &gauges.hedged),
            ("expert_fallbacks", "Experts computed here because no peer could", &gauges.fallbacks),
        ] {
            registry.register(name, help, gauge.clone());
        }
        let help = "Mean round trip to the connected peers";
        registry.register_with_unit("peer_round_trip", help, seconds, gauges.round_trip.clone());
        Self { registry, ..this }
    }

    pub(super) fn responded(&self, route: String, status: u16) {
        self.responses.get_or_create(&Response { route, status: status.into() }).inc();
    }

    /// Notes an answer that has ended.
    pub(super) fn answered(&self, prompt_tokens: usize, completion_tokens: usize, summary: &Summary) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.completion_tokens.inc_by(completion_tokens as u64);
        self.first_token.observe(summary.timings.prefill.as_secs_f64());
        if summary.timings.decode_tokens > 0 {
            self.between_tokens.observe(summary.timings.decode.as_secs_f64() / summary.timings.decode_tokens as f64);
        }
    }

    /// All of it as text.
    pub(super) fn exposition(&self) -> String {
        let engine = self.client.engine();
        self.gauges.running.set(engine.running as i64);
        self.gauges.waiting.set(engine.waiting as i64);
        self.gauges.kv_bytes.set(engine.kv_bytes as i64);
        self.gauges.reused_tokens.set(engine.reused_tokens as i64);
        self.gauges.steps.set(engine.steps as i64);
        self.gauges.preemptions.set(engine.preemptions as i64);
        self.gauges.drafted.set(engine.drafted as i64);
        self.gauges.accepted.set(engine.accepted as i64);
        self.gauges.frames.set(engine.network.frames as i64);
        self.gauges.retries.set(engine.network.retries as i64);
        self.gauges.hedged.set(engine.network.hedged as i64);
        self.gauges.fallbacks.set(engine.network.fallbacks as i64);
        if let Some(network) = self.client.network() {
            let round_trips: Vec<Duration> =
                network.directory().peers().iter().filter_map(|peer| peer.round_trip).collect();
            let missing: usize = network.directory().missing().0.values().map(Vec::len).sum();
            self.gauges.peers.set(round_trips.len() as i64);
            self.gauges.missing.set(missing as i64);
            let sum: Duration = round_trips.iter().sum();
            self.gauges.round_trip.set(sum.as_secs_f64() / round_trips.len().max(1) as f64);
        }
        let mut text = String::new();
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "cannot write the metrics");
        }
        text
    }
}
