//! Many clients of one volunteer: rows a second, each client's share of them, and how fast a volunteer that is full refuses.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use hanse_node::testnet::{Node, Testnet};
use hanse_protocol::discovery::keys::DEFAULT_NETWORK;
use hanse_protocol::{
    Combine, DataConnection, DataEndpoint, ExpertCall, ExpertRows, Frame, Hello, Identity, ModelId, RefusalCode,
};
use hanse_router::ExpertLayout;
use hanse_router::network::bind_any;
use hanse_router::stats::quantile_of;
use serde::Serialize;
use tokio::task::JoinSet;

use super::Micros;
use crate::cli::BenchArgs;
use crate::output::say;

const CROWDS: [usize; 3] = [1, 8, 64];
/// Of each crowd in each round.
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURED: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(20);
/// Rows of the calls that fill the volunteer, and (row, expert) pairs of all of them together: twice what may wait.
const FILLING_ROWS: u32 = 512;
const FILLING_PAIRS: usize = 32 << 10;
/// The most such calls at a time, if the volunteer hosts few experts.
const FILLING_CALLS: usize = 64;
const REFUSED: usize = 500;

#[derive(Serialize)]
pub(super) struct Report {
    crowds: Vec<Crowd>,
    /// Rows a second of the largest crowd over those of one client, median of rounds.
    gain: f64,
    /// From sending a call to a full volunteer until its refusal is here.
    refused_us: Option<Micros>,
    refusals: usize,
}

#[derive(Serialize)]
struct Crowd {
    clients: usize,
    /// Medians over the rounds.
    rows_per_second: f64,
    /// Rows of the client that got fewest, as a share of the mean.
    least_share: f64,
    call_us: Micros,
}

/// A client that knows one volunteer and nothing else.
#[derive(Clone)]
struct Caller {
    /// Lives as long as its connection.
    _endpoint: DataEndpoint,
    connection: DataConnection,
    call: ExpertCall,
}

impl Caller {
    async fn connect(
        identity: &Identity,
        node: &Node,
        model: ModelId,
        args: &BenchArgs,
        layout: &ExpertLayout,
    ) -> anyhow::Result<Self> {
        let endpoint = bind_any(identity)?;
        let connection = endpoint.connect(node.peer_id(), node.data_address(), PATIENCE).await?;
        let hello = Frame::Hello(Hello { network: DEFAULT_NETWORK.to_owned(), model });
        let Frame::Welcome(_) = connection.call(&hello, PATIENCE).await? else { bail!("a volunteer is not welcoming") };
        let (layer, hidden, _) = super::call::one_row(layout)?;
        let mut body = Vec::new();
        args.wire.encode_into(&hidden, hidden.len(), &mut body)?;
        let call = ExpertCall {
            request_id: 1,
            model,
            layer,
            hidden_size: layout.hidden_size,
            rows: 1,
            dtype: args.wire,
            combine: Combine::Peer,
            deadline_ms: PATIENCE.as_millis() as u32,
            assignments: vec![ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }],
            body: Bytes::from(body),
        };
        Ok(Self { _endpoint: endpoint, connection, call })
    }

    /// Calls one after another until `end`; how long those took that ended after `start`.
    async fn run(self, start: Instant, end: Instant) -> anyhow::Result<Vec<Duration>> {
        let frame = Frame::Call(self.call);
        let mut times = Vec::new();
        loop {
            let sent = Instant::now();
            let answer = self.connection.call(&frame, PATIENCE).await?;
            let now = Instant::now();
            if !matches!(answer, Frame::Answer(_)) {
                bail!("a client was refused: {answer:?}");
            }
            if now >= end {
                return Ok(times);
            }
            if now >= start {
                times.push(now - sent);
            }
        }
    }
}

pub(super) async fn run(
    args: &BenchArgs,
    model: ModelId,
    layout: &ExpertLayout,
    net: &Testnet,
) -> anyhow::Result<Report> {
    // It hosts expert 0 of the first layer, whatever the number of volunteers.
    let node = net.nodes().first().context("no volunteer")?;
    let mut callers = Vec::new();
    for _ in 0..CROWDS.into_iter().max().unwrap_or(1) {
        callers.push(Caller::connect(&Identity::generate(), node, model, args, layout).await?);
    }
    let mut rounds: Vec<Vec<(f64, f64, Vec<Duration>)>> = vec![Vec::new(); CROWDS.len()];
    for _ in 0..args.rounds.max(1) {
        for (crowd, rounds) in CROWDS.into_iter().zip(&mut rounds) {
            rounds.push(measure(&callers[..crowd]).await?);
        }
    }
    let crowds = CROWDS.into_iter().zip(&rounds).map(|(clients, rounds)| Crowd {
        clients,
        rows_per_second: quantile_of(rounds.iter().map(|round| round.0).collect(), 0.5),
        least_share: quantile_of(rounds.iter().map(|round| round.1).collect(), 0.5),
        call_us: Micros::of(&rounds.iter().flat_map(|round| round.2.iter().copied()).collect::<Vec<_>>()),
    });
    let (Some(one), Some(most)) = (rounds.first(), rounds.last()) else { bail!("nothing was measured") };
    let gain = quantile_of(one.iter().zip(most).map(|(one, most)| most.0 / one.0).collect(), 0.5);
    let hosted = node.spec().parse::<hanse_node::ExpertsSpec>()?;
    let layers = layout.layers.keys().max().map_or(0, |last| last + 1);
    let layer = callers[0].call.layer;
    let experts = hosted.resolve(layout, layers)?.into_iter().filter(|(l, _)| *l == layer).map(|(_, e)| e).collect();
    // One client with two connections, so that a refusal does not wait for the bytes of large calls.
    let identity = Identity::generate();
    let filling = Caller::connect(&identity, node, model, args, layout).await?;
    let refused = Caller::connect(&identity, node, model, args, layout).await?;
    let refused = refusals(&filling, &refused, experts).await?;
    Ok(Report {
        crowds: crowds.collect(),
        gain,
        refused_us: (!refused.is_empty()).then(|| Micros::of(&refused)),
        refusals: refused.len(),
    })
}

/// Rows a second, the least share, and the duration of every call.
async fn measure(callers: &[Caller]) -> anyhow::Result<(f64, f64, Vec<Duration>)> {
    let start = Instant::now() + WARM_UP;
    let end = start + MEASURED;
    let mut running: JoinSet<_> = callers.iter().map(|caller| caller.clone().run(start, end)).collect();
    let mut shares = Vec::new();
    let mut times = Vec::new();
    while let Some(done) = running.join_next().await {
        let own = done??;
        shares.push(own.len() as f64);
        times.extend(own);
    }
    let mean = times.len() as f64 / shares.len() as f64;
    let least = shares.into_iter().fold(f64::MAX, f64::min);
    Ok((times.len() as f64 / MEASURED.as_secs_f64(), least / mean.max(1e-9), times))
}

/// Fills the volunteer's queue with large calls, and times the refusals of small ones of the same client.
async fn refusals(filling: &Caller, refused: &Caller, experts: Vec<u32>) -> anyhow::Result<Vec<Duration>> {
    let mut large = filling.call.clone();
    large.rows = FILLING_ROWS;
    large.body = large.body.repeat(FILLING_ROWS as usize).into();
    let rows: Vec<u32> = (0..FILLING_ROWS).collect();
    let weights = vec![1.0; rows.len()];
    let calls = (FILLING_PAIRS / (rows.len() * experts.len().max(1)) + 1).min(FILLING_CALLS);
    large.assignments =
        experts.into_iter().map(|expert| ExpertRows { expert, rows: rows.clone(), weights: weights.clone() }).collect();
    let (large, small) = (Frame::Call(large), Frame::Call(refused.call.clone()));
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < REFUSED && started.elapsed() < PATIENCE {
        let mut large_calls: JoinSet<_> = (0..calls)
            .map(|_| {
                let (connection, large) = (filling.connection.clone(), large.clone());
                async move { connection.call(&large, PATIENCE).await.is_ok() }
            })
            .collect();
        while !large_calls.is_empty() {
            let sent = Instant::now();
            let answer = refused.connection.call(&small, PATIENCE).await?;
            if matches!(answer, Frame::Refusal(refusal) if refusal.code == RefusalCode::Busy) {
                times.push(sent.elapsed());
            }
            while large_calls.try_join_next().is_some() {}
        }
    }
    Ok(times)
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        for crowd in &self.crowds {
            say!(
                "crowd      {:>2} clients, a row each: {:.0} rows/s, least share {:.2} of the mean; {}",
                crowd.clients,
                crowd.rows_per_second,
                crowd.least_share,
                crowd.call_us
            );
        }
        say!("           largest crowd over one client: {:.1}, median of pairs", self.gain);
        match &self.refused_us {
            Some(refused) => say!("           a full volunteer refused {} calls: {refused}", self.refusals),
            None => say!("           the volunteer was never full"),
        }
        Ok(())
    }
}
