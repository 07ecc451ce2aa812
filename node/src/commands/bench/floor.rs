//! An expert call beside the echo of the same bytes over bare QUIC, with the same TLS and transport settings: what the call itself adds.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use hanse_protocol::{
    Combine, DataConnection, DataEndpoint, ExpertAnswer, ExpertCall, ExpertRows, Frame, Identity, ModelId, PeerId,
    WireDtype, write_frame,
};
use hanse_router::network::bind_any;
use hanse_router::{Client, ExpertLayout, Usage};
use serde::Serialize;

use super::{Micros, call};
use crate::output::say;

/// Before times count: windows and statistics grow.
const WARM_UP: usize = 100;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize)]
pub(super) struct Report {
    calls: usize,
    /// Of a row.
    values: u32,
    sent_bytes: usize,
    received_bytes: usize,
    echo_us: Micros,
    call_us: Micros,
    /// As the peer tells, of the latest calls.
    compute_us: Micros,
    /// The call's quantile less the echo's.
    over_echo_us: Micros,
}

/// Calls and echoes take turns, all in one task, so that what disturbs one disturbs the other.
pub(super) async fn run(
    calls: usize,
    wire: WireDtype,
    client: &Client,
    layout: &ExpertLayout,
) -> anyhow::Result<Report> {
    let network = client.network().context("not on a network")?.clone();
    let (layer, hidden, routing) = call::one_row(layout)?;
    let (sent_bytes, received_bytes) = frame_bytes(wire, layout.hidden_size).await?;
    let (address, peer) = start_echo(sent_bytes, received_bytes)?;
    let endpoint = bind_any(&Identity::generate())?;
    let connection = endpoint.connect(peer, address, PATIENCE).await?;
    let (mut send, mut recv) = connection.open_bare().await.context("the echo cannot be reached")?;
    let measuring = tokio::spawn(async move {
        let (request, mut answer) = (Bytes::from(vec![7; sent_bytes]), vec![0; received_bytes]);
        let (mut echoes, mut times) = (Vec::with_capacity(calls), Vec::with_capacity(calls));
        let mut usage = Usage::default();
        for round in 0..WARM_UP + calls.max(1) {
            let started = Instant::now();
            send.write_chunk(request.clone()).await?;
            recv.read_exact(&mut answer).await?;
            let echoed = started.elapsed();
            let started = Instant::now();
            network.forward(layer, &hidden, &routing, &mut usage).await?;
            if round >= WARM_UP {
                echoes.push(echoed);
                times.push(started.elapsed());
            }
        }
        anyhow::Ok((echoes, times))
    });
    let (echoes, times) = measuring.await??;
    connection.close("measured");
    let asked = client.peers().into_iter().find(|report| report.advert.hosted.contains(layer, 0));
    let stats = asked.context("nobody hosts expert 0")?.stats;
    let compute = |quantile| stats.compute_quantile(quantile).as_secs_f64() * 1e6;
    let (echo_us, call_us) = (Micros::of(&echoes), Micros::of(&times));
    Ok(Report {
        calls: times.len(),
        values: layout.hidden_size,
        sent_bytes,
        received_bytes,
        echo_us,
        call_us,
        compute_us: Micros { p50: compute(0.5), p99: compute(0.99) },
        over_echo_us: Micros { p50: call_us.p50 - echo_us.p50, p99: call_us.p99 - echo_us.p99 },
    })
}

/// Bytes of the frames of one call of one row and of its answer.
async fn frame_bytes(wire: WireDtype, hidden_size: u32) -> anyhow::Result<(usize, usize)> {
    let body = Bytes::from(vec![0; wire.row_bytes(hidden_size as usize)]);
    let call = ExpertCall {
        request_id: 1,
        model: ModelId([0; 32]),
        layer: 0,
        hidden_size,
        rows: 1,
        dtype: wire,
        combine: Combine::Client,
        deadline_ms: 1,
        assignments: vec![ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }],
        body: body.clone(),
    };
    let answer = ExpertAnswer {
        request_id: 1,
        dtype: wire,
        rows: 1,
        hidden_size,
        queue_us: 0,
        compute_us: 0,
        queued_rows: 0,
        body,
    };
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    write_frame(&mut sent, &Frame::Call(call)).await?;
    write_frame(&mut received, &Frame::Answer(answer)).await?;
    Ok((sent.len(), received.len()))
}

/// Starts an echo on a thread and a runtime of its own, as a volunteer has; it ends with the connection.
fn start_echo(sent_bytes: usize, received_bytes: usize) -> anyhow::Result<(SocketAddr, PeerId)> {
    let identity = Identity::generate();
    let peer = identity.peer_id();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let endpoint = {
        let _inside = runtime.enter();
        DataEndpoint::bind(&identity, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?
    };
    let address = endpoint.local_addr()?;
    std::thread::Builder::new().name("echo".into()).spawn(move || {
        // Spawned, so that it runs where the tasks of a volunteer do.
        let echo = runtime.spawn(async move {
            let connection = endpoint.accept().await?.establish(PATIENCE).await.ok()?;
            echo(&connection, sent_bytes, received_bytes).await
        });
        let _ = runtime.block_on(echo);
    })?;
    Ok((address, peer))
}

async fn echo(connection: &DataConnection, sent_bytes: usize, received_bytes: usize) -> Option<()> {
    let (mut send, mut recv) = connection.accept_bare().await?;
    let (mut request, answer) = (vec![0; sent_bytes], Bytes::from(vec![8; received_bytes]));
    loop {
        recv.read_exact(&mut request).await.ok()?;
        send.write_chunk(answer.clone()).await.ok()?;
    }
}

impl Report {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let Self { calls, values, sent_bytes, received_bytes, .. } = self;
        say!(
            "floor      1 row of {values}, 1 expert, {calls} calls and echoes of {sent_bytes} and {received_bytes} bytes in turn"
        );
        say!("           bare QUIC echo: {}", self.echo_us);
        say!("           call: {}, of which computing {}", self.call_us, self.compute_us);
        say!("           over the echo: {}", self.over_echo_us);
        Ok(())
    }
}
