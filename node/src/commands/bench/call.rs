//! One expert call, from routing to the added-up result.

use std::time::Instant;

use anyhow::Context as _;
use hanse_model::Routing;
use hanse_router::{Client, ExpertLayout, Usage};
use serde::Serialize;

use super::Micros;
use crate::output::say;

#[derive(Serialize)]
pub(super) struct Report {
    calls: usize,
    p50_us: f64,
    p99_us: f64,
    /// Of which the peer computed.
    compute_p50_us: f64,
    compute_p99_us: f64,
}

/// A row that says nothing, and its way to expert 0 of the first layer with experts.
pub(super) fn one_row(layout: &ExpertLayout) -> anyhow::Result<(u32, Vec<f32>, Routing)> {
    let (&layer, _) = layout.layers.first_key_value().context("the model has no experts")?;
    let hidden = (0..layout.hidden_size).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
    Ok((layer, hidden, Routing { top_k: 1, experts: vec![0], weights: vec![1.0] }))
}

/// Calls of one row to one expert, one at a time.
pub(super) async fn run(calls: usize, client: &Client, layout: &ExpertLayout) -> anyhow::Result<Report> {
    let network = client.network().context("not on a network")?;
    let (layer, hidden, routing) = one_row(layout)?;
    let mut usage = Usage::default();
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls.max(1) {
        let started = Instant::now();
        network.forward(layer, &hidden, &routing, &mut usage).await?;
        times.push(started.elapsed());
    }
    // Expert 0 is hosted by one peer alone, which was asked for nothing else yet.
    let asked = client.peers().into_iter().find(|report| report.advert.hosted.contains(layer, 0));
    let stats = asked.context("nobody hosts expert 0")?.stats;
    let Micros { p50, p99 } = Micros::of(&times);
    Ok(Report {
        calls: times.len(),
        p50_us: p50,
        p99_us: p99,
        compute_p50_us: stats.compute_quantile(0.5).as_secs_f64() * 1e6,
        compute_p99_us: stats.compute_quantile(0.99).as_secs_f64() * 1e6,
    })
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!("call       1 row, 1 expert, {} calls: p50 {:.0} us, p99 {:.0} us", self.calls, self.p50_us, self.p99_us);
        say!("           of which computing: p50 {:.0} us, p99 {:.0} us", self.compute_p50_us, self.compute_p99_us);
        Ok(())
    }
}
