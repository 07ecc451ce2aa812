//! What a call costs over loopback beside a bare echo over quinn, for one row of hidden states at a time.
//!
//! `cargo run --release -p hanse-protocol --example call_latency [-- VALUES_PER_ROW [CALLS]]`
//!
//! Prints the median and the 99th percentile of three ways to send a body of `4 * VALUES_PER_ROW` bytes there and back: a
//! [`DataConnection::call`]; an echo on one long-lived quinn stream with the same body, libp2p's TLS configuration and quinn's
//! default settings; and the same echo with a new stream for each request.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_protocol::{
    Combine, DataConnection, DataEndpoint, ExpertAnswer, ExpertCall, ExpertRows, Frame, FrameLimits, Identity, ModelId,
    WireDtype,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let hidden_size: u32 = arguments.next().map_or(Ok(2048), |text| text.parse())?;
    let calls: usize = arguments.next().map_or(Ok(2000), |text| text.parse())?;

    let connection = hanse().await?;
    let mut times = Vec::new();
    for request_id in 0..calls as u64 {
        let start = Instant::now();
        let answer = connection.call(&call(request_id, hidden_size), PATIENCE).await?;
        times.push(start.elapsed());
        assert!(matches!(answer, Frame::Answer(_)), "the server answers every call");
    }
    report("hanse call", hidden_size, times);

    let connection = bare().await?;
    let body = vec![1; 4 * hidden_size as usize];
    let mut back = body.clone();
    let (mut send, mut recv) = connection.open_bi().await?;
    let mut times = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        send.write_all(&body).await?;
        recv.read_exact(&mut back).await?;
        times.push(start.elapsed());
    }
    report("quinn, one stream", hidden_size, times);

    let mut times = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        let (mut send, mut recv) = connection.open_bi().await?;
        send.write_all(&body).await?;
        send.finish()?;
        recv.read_exact(&mut back).await?;
        times.push(start.elapsed());
    }
    report("quinn, new streams", hidden_size, times);
    Ok(())
}

fn call(request_id: u64, hidden_size: u32) -> Frame {
    Frame::Call(ExpertCall {
        request_id,
        model: ModelId([0; 32]),
        layer: 0,
        hidden_size,
        rows: 1,
        dtype: WireDtype::F32,
        combine: Combine::Peer,
        deadline_ms: 10_000,
        assignments: vec![ExpertRows { expert: 0, rows: vec![0], weights: vec![1.0] }],
        body: vec![0; 4 * hidden_size as usize].into(),
    })
}

/// A connection to an endpoint that sends every body back.
async fn hanse() -> Result<DataConnection, Box<dyn Error>> {
    let identity = Identity::generate();
    let server = DataEndpoint::bind(&identity, "127.0.0.1:0".parse()?)?;
    let client = DataEndpoint::bind(&Identity::generate(), "127.0.0.1:0".parse()?)?;
    let address = server.local_addr()?;
    tokio::spawn(async move {
        let pending = server.accept().await.expect("the endpoint is open");
        let connection = pending.establish(PATIENCE).await.expect("a handshake");
        while let Some(mut stream) = connection.accept_stream().await {
            while let Ok(Frame::Call(call)) = stream.read(&FrameLimits::default()).await {
                let answer = ExpertAnswer {
                    request_id: call.request_id,
                    dtype: call.dtype,
                    rows: call.rows,
                    hidden_size: call.hidden_size,
                    queue_us: 0,
                    compute_us: 0,
                    queued_rows: 0,
                    body: call.body,
                };
                stream.write(&Frame::Answer(answer)).await.expect("the client waits");
            }
        }
    });
    Ok(client.connect(identity.peer_id(), address, PATIENCE).await?)
}

/// A plain quinn connection to an endpoint that sends every byte back.
async fn bare() -> Result<quinn::Connection, Box<dyn Error>> {
    let identity = Identity::generate();
    let tls = libp2p_tls::make_server_config(identity.keypair())?;
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let server = quinn::Endpoint::server(config, "127.0.0.1:0".parse()?)?;
    let address = server.local_addr()?;
    tokio::spawn(async move {
        let connection = server.accept().await.expect("the endpoint is open").await.expect("a handshake");
        while let Ok((mut send, mut recv)) = connection.accept_bi().await {
            tokio::spawn(async move {
                while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
                    send.write_chunk(chunk.bytes).await.expect("the client waits");
                }
            });
        }
    });
    let tls = libp2p_tls::make_client_config(Identity::generate().keypair(), Some(identity.peer_id()))?;
    let client = quinn::Endpoint::client("127.0.0.1:0".parse()?)?;
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    Ok(client.connect_with(config, address, "l")?.await?)
}

fn report(what: &str, hidden_size: u32, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    println!("{what:<20} {:>8} bytes  p50 {:>9.1?}  p99 {:>9.1?}", 4 * hidden_size, at(0.5), at(0.99));
}
