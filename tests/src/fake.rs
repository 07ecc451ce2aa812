//! A peer that announces experts as a volunteer does, and then misbehaves on the data plane.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hanse_model::Checkpoint;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig, Reachability};
use hanse_protocol::{
    Advert, DataConnection, DataEndpoint, ExpertAnswer, ExpertCall, Frame, FrameLimits, FrameStream, HostedExperts,
    Identity, PeerId, Precision, Refusal, RefusalCode, SignedAdvert, Welcome, WireDtype,
};
use hanse_router::client::layout_of;
use tokio_util::task::AbortOnDropHandle;

use crate::net::{Net, loopback};

/// What the peer does when it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Closes the connection with the call on it, as one that crashes.
    Vanish,
    /// Never answers.
    Hang,
    /// Answers with a row too few.
    Short,
    /// Answers with a frame that is no answer.
    Welcome,
    /// Says that it does not have the expert.
    NotHosted,
    /// Says each time that it is full.
    Busy,
    /// Announces the data plane of somebody else as its own.
    PointsTo(SocketAddr),
}

/// The peer. Dropped, it vanishes.
#[derive(Debug)]
pub struct FakePeer {
    /// Who it says it is; this much is true.
    pub peer_id: PeerId,
    calls: Arc<AtomicUsize>,
    _discovery: Discovery,
    _task: AbortOnDropHandle<()>,
}

impl FakePeer {
    /// Joins `net` and announces every expert of its model.
    pub async fn join(net: &Net, manner: Manner) -> Self {
        let identity = Identity::generate();
        let config = DiscoveryConfig {
            network: net.config().network,
            listen: vec![loopback()],
            bootstrap: vec![net.bootstrap()],
            ..DiscoveryConfig::default()
        };
        let discovery = Discovery::start(&identity, config).await.unwrap();
        let endpoint = DataEndpoint::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = match manner {
            Manner::PointsTo(address) => address,
            _ => endpoint.local_addr().unwrap(),
        };
        let layers = layout_of(Checkpoint::open(&net.dir).unwrap().spec()).layers;
        let mut hosted = HostedExperts::new();
        for (&layer, &experts) in &layers {
            (0..experts).for_each(|expert| hosted.insert(layer, expert).unwrap());
        }
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let mut keys = ProviderKey::covering(net.model, layers.keys().copied());
        keys.push(ProviderKey::volunteers());
        let advert = Advert {
            model: net.model,
            hosted,
            layers,
            wire_dtypes: WireDtype::ALL.to_vec(),
            data_addresses: vec![address],
            capacity_rows: 1000,
            load_permille: 0,
            draining: None,
            sequence: now,
            expires_unix_ms: now + 60_000,
            popularity: Vec::new(),
            loading: HostedExperts::new(),
            reachability: Reachability::Direct,
            circuits: Vec::new(),
            precision: Precision::F32,
            variant_of: None,
        };
        let signed = SignedAdvert::sign(&advert, &identity).unwrap();
        discovery.announce(vec![(vec![net.model], signed)], keys).await.unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let serving = serve(endpoint, manner, advert, calls.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(serving));
        Self { peer_id: identity.peer_id(), calls, _discovery: discovery, _task: task }
    }

    /// How often it was called.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

async fn serve(endpoint: DataEndpoint, manner: Manner, advert: Advert, calls: Arc<AtomicUsize>) {
    let mut streams = tokio::task::JoinSet::new();
    while let Some(pending) = endpoint.accept().await {
        let Ok(connection) = pending.establish(Duration::from_secs(5)).await else { continue };
        let (advert, calls) = (advert.clone(), calls.clone());
        streams.spawn(async move {
            let mut streams = tokio::task::JoinSet::new();
            while let Some(stream) = connection.accept_stream().await {
                streams.spawn(serve_stream(connection.clone(), stream, manner, advert.clone(), calls.clone()));
            }
        });
    }
}

async fn serve_stream(
    connection: DataConnection,
    mut stream: FrameStream,
    manner: Manner,
    advert: Advert,
    calls: Arc<AtomicUsize>,
) {
    let welcome = Frame::Welcome(Welcome { model: advert.model, dtypes: advert.wire_dtypes, max_rows: 512 });
    while let Ok(frame) = stream.read(&FrameLimits::default()).await {
        let answer = match frame {
            Frame::Call(call) => {
                calls.fetch_add(1, Ordering::Relaxed);
                let refused = |code| Frame::Refusal(Refusal::new(call.request_id, code, "no".to_owned()));
                match manner {
                    Manner::Vanish => return connection.close("gone"),
                    Manner::Hang | Manner::PointsTo(_) => return std::future::pending().await,
                    Manner::Short => short_answer(&call),
                    Manner::Welcome => welcome.clone(),
                    Manner::NotHosted => refused(RefusalCode::NotHosted),
                    Manner::Busy => refused(RefusalCode::Busy),
                }
            }
            _ => welcome.clone(),
        };
        if stream.write(&answer).await.is_err() {
            return;
        }
    }
}

fn short_answer(call: &ExpertCall) -> Frame {
    let rows = u32::try_from(call.answer_rows()).unwrap() - 1;
    let bytes = rows as usize * call.dtype.row_bytes(call.hidden_size as usize);
    Frame::Answer(ExpertAnswer {
        request_id: call.request_id,
        dtype: call.dtype,
        rows,
        hidden_size: call.hidden_size,
        queue_us: 0,
        compute_us: 0,
        queued_rows: 0,
        body: vec![0; bytes].into(),
    })
}
