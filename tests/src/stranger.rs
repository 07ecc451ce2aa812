//! A stranger on a volunteer's data plane: has an identity, as everyone can, and keeps no other rule.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hanse_model::Checkpoint;
use hanse_protocol::{
    ALPN, Combine, ExpertCall, ExpertRows, Frame, FrameError, FrameLimits, Identity, ModelId, PeerId, RefusalCode,
    WireDtype, read_frame, write_frame,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream};

use crate::net::Net;

/// An answer that takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A QUIC connection on which any bytes can be sent.
#[derive(Debug)]
pub struct Stranger {
    connection: Connection,
    // Kept, since a dropped endpoint stops its connections.
    _endpoint: Endpoint,
}

impl Stranger {
    /// Dials a volunteer's data plane.
    pub async fn dial(peer: PeerId, address: SocketAddr) -> Self {
        let mut tls = libp2p_tls::make_client_config(Identity::generate().keypair(), Some(peer)).unwrap();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = endpoint.connect_with(config, address, "l").unwrap().await.unwrap();
        Self { connection, _endpoint: endpoint }
    }

    /// Opens a stream and sends `bytes`, without ending it.
    pub async fn begin(&self, bytes: &[u8]) -> (SendStream, RecvStream) {
        let (mut send, recv) = self.connection.open_bi().await.unwrap();
        // It may be stopped in the middle.
        let _ = send.write_all(bytes).await;
        (send, recv)
    }

    /// Sends `bytes` on a stream of its own, ends it, and reads what comes back.
    ///
    /// # Errors
    /// No frame came back.
    pub async fn send(&self, bytes: &[u8]) -> Result<Frame, FrameError> {
        let (mut send, mut recv) = self.begin(bytes).await;
        let _ = send.finish();
        let limits = FrameLimits::default();
        tokio::time::timeout(PATIENCE, read_frame(&mut recv, &limits)).await.expect("an answer in time")
    }

    /// Sends `bytes` and expects to be refused.
    pub async fn refusal(&self, bytes: &[u8]) -> (RefusalCode, String) {
        match self.send(bytes).await {
            Ok(Frame::Refusal(refusal)) => (refusal.code, refusal.message),
            other => panic!("no refusal: {other:?}"),
        }
    }
}

/// A good call of one row for one expert of the network's model.
#[must_use]
pub fn call(net: &Net, layer: u32, expert: u32) -> ExpertCall {
    call_of(&net.dir, net.model, layer, expert)
}

/// The same for the model in a folder, whose id is `model`.
#[must_use]
pub fn call_of(dir: &Path, model: ModelId, layer: u32, expert: u32) -> ExpertCall {
    let hidden_size = Checkpoint::open(dir).unwrap().spec().hidden_size as u32;
    ExpertCall {
        request_id: 1,
        model,
        layer,
        hidden_size,
        rows: 1,
        dtype: WireDtype::F32,
        combine: Combine::Client,
        deadline_ms: 5000,
        assignments: vec![ExpertRows { expert, rows: vec![0], weights: vec![1.0] }],
        body: vec![0; hidden_size as usize * 4].into(),
    }
}

/// A frame's bytes.
pub async fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, frame).await.unwrap();
    bytes
}
