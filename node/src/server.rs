//! The volunteer's data plane: accepts connections, checks every frame, hands work to the batcher.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hanse_protocol::discovery::Discovery;
use hanse_protocol::{
    DataConnection, DataEndpoint, Draining, ExpertAnswer, ExpertCall, Fetch, Frame, FrameError, FrameLimits,
    FrameStream, Hello, ModelId, PeerId, PendingConnection, Refusal, RefusalCode, Welcome, WireDtype,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::batcher::{Batcher, Work, WorkError};
use crate::counters::{Counters, Demand};
use crate::giving::{Giving, Held, MAX_CHUNKS_OF_ONE};
use crate::owner::Bandwidth;
use crate::store::{ExpertStore, Snapshot};

/// Connections served at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
/// A handshake that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows accepted in one call.
pub(crate) const MAX_ROWS: u32 = 512;
/// What a client that met a full queue is told to wait.
const BUSY_RETRY: Duration = Duration::from_millis(50);

/// What every connection of a volunteer needs.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) network: String,
    pub(crate) model: ModelId,
    pub(crate) store: Arc<ExpertStore>,
    /// The most experts that a row of the model has.
    pub(crate) top_k: u32,
    pub(crate) batcher: Batcher,
    pub(crate) counters: Counters,
    pub(crate) demand: Demand,
    pub(crate) draining: Pause,
    /// The owner's limit on what is sent.
    pub(crate) bandwidth: Option<Bandwidth>,
    /// The model's manifest and weights, if they are given out.
    pub(crate) giving: Option<Giving>,
}

/// Whether new calls are refused, and why.
#[derive(Debug, Default)]
pub(crate) struct Pause(AtomicU8);

impl Pause {
    pub(crate) fn get(&self) -> Option<Draining> {
        Draining::from_code(self.0.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, why: Option<Draining>) {
        self.0.store(why.map_or(0, Draining::code), Ordering::Relaxed);
    }
}

/// A refusal without the request id, which the caller of the failing function knows.
type Refused = (RefusalCode, String);

/// Someone to be served, before or after its handshake.
enum Accepted {
    Pending(Box<PendingConnection>),
    Established(DataConnection),
}

impl Server {
    /// Accepts connections until cancelled, then lets the calls in progress end.
    pub(crate) async fn run(self: Arc<Self>, endpoint: DataEndpoint, discovery: Discovery, cancel: CancellationToken) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let place = tokio::select! {
                () = cancel.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                place = places.clone().acquire_owned() => place,
            };
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                pending = endpoint.accept() => pending.map(|pending| Accepted::Pending(Box::new(pending))),
                // By way of a relay, or through a hole in a router.
                connection = discovery.accept_data() => connection.map(Accepted::Established),
            };
            let (Ok(place), Some(accepted)) = (place, accepted) else { break };
            let (server, cancel) = (self.clone(), cancel.clone());
            connections.spawn(async move {
                match accepted {
                    Accepted::Pending(pending) => server.serve_pending(*pending, &cancel).await,
                    Accepted::Established(connection) => server.serve_established(connection, &cancel).await,
                }
                drop(place);
            });
        }
        while connections.join_next().await.is_some() {}
    }

    async fn serve_pending(self: Arc<Self>, pending: PendingConnection, cancel: &CancellationToken) {
        let address = pending.remote_address();
        match pending.establish(HANDSHAKE_TIMEOUT).await {
            Ok(connection) => self.serve_established(connection, cancel).await,
            Err(error) => tracing::debug!(%address, %error, "handshake failed"),
        }
    }

    async fn serve_established(self: Arc<Self>, connection: DataConnection, cancel: &CancellationToken) {
        let span = tracing::info_span!("client", peer = %connection.peer_id());
        self.serve_connection(connection, cancel).instrument(span).await;
    }

    async fn serve_connection(self: Arc<Self>, connection: DataConnection, cancel: &CancellationToken) {
        let mut streams = JoinSet::new();
        let chunks = Arc::new(Semaphore::new(MAX_CHUNKS_OF_ONE));
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                Some(_) = streams.join_next() => {}
                stream = connection.accept_stream() => {
                    let Some(stream) = stream else { break };
                    let (server, cancel, chunks) = (self.clone(), cancel.clone(), chunks.clone());
                    let client = connection.peer_id();
                    streams.spawn(async move { server.serve_stream(client, stream, chunks, &cancel).await }.in_current_span());
                }
            }
        }
        while streams.join_next().await.is_some() {}
    }

    /// Answers one frame after another until the client ends the stream or breaks a rule.
    async fn serve_stream(
        &self,
        client: PeerId,
        mut stream: FrameStream,
        chunks: Arc<Semaphore>,
        cancel: &CancellationToken,
    ) {
        let limits = self.limits();
        loop {
            let read = tokio::select! {
                () = cancel.cancelled() => {
                    // The last answer may still be on its way: closing the connection now would lose it.
                    stream.finish().await;
                    return;
                }
                read = stream.read(&limits) => read,
            };
            // The places of a chunk are free again when it has been written.
            let mut _places = None;
            let answer = match read {
                Ok(Frame::Hello(hello)) => self.answer_hello(&hello),
                Ok(Frame::Call(call)) => match self.answer_call(client, call, &mut stream).await {
                    Some(answer) => answer,
                    None => return,
                },
                Ok(Frame::Fetch(fetch)) => {
                    let (answer, places): Held = tokio::select! {
                        held = self.give(&fetch, chunks.clone()) => held,
                        () = stream.cancelled() => return,
                    };
                    _places = places;
                    answer
                }
                Ok(other) => {
                    self.counters.malformed();
                    let text = format!("a {:?} frame is not a request", other.kind());
                    Frame::Refusal(Refusal::new(0, RefusalCode::Malformed, text))
                }
                Err(error) => {
                    self.on_bad_frame(&error, &mut stream).await;
                    return;
                }
            };
            // Chunks have waited already, behind answers.
            if let (Some(bandwidth), Frame::Answer(ExpertAnswer { body, .. })) = (&self.bandwidth, &answer) {
                bandwidth.wait(body.len()).await;
            }
            if let Err(error) = stream.write(&answer).await {
                tracing::debug!(%error, "answer not delivered");
                return;
            }
            if matches!(&answer, Frame::Refusal(refusal) if refusal.code.ends_stream()) {
                return;
            }
        }
    }

    /// The protocol's limits, with no more room for bodies than calls of this model need.
    fn limits(&self) -> FrameLimits {
        let limits = FrameLimits::default();
        let row_bytes = WireDtype::F32.row_bytes(self.store.hidden_size());
        let all_rows = u32::try_from(row_bytes * MAX_ROWS as usize).unwrap_or(u32::MAX);
        // The limit also holds for answers, which have up to a row per assignment.
        let most = all_rows.saturating_mul(self.top_k.max(1));
        FrameLimits { max_rows: MAX_ROWS, max_body_bytes: limits.max_body_bytes.min(most), ..limits }
    }

    async fn on_bad_frame(&self, error: &FrameError, stream: &mut FrameStream) {
        if let Some(refusal) = error.refusal() {
            self.counters.malformed();
            tracing::debug!(%error, "bad frame");
            // The client may not listen any more.
            let _ = stream.write(&Frame::Refusal(refusal)).await;
        }
    }

    fn answer_hello(&self, hello: &Hello) -> Frame {
        let refused = if hello.network != self.network {
            Some((RefusalCode::NetworkMismatch, format!("this is network {:?}", self.network)))
        } else {
            self.check_model(hello.model).err()
        };
        match refused {
            Some((code, text)) => {
                self.counters.refused();
                Frame::Refusal(Refusal::new(0, code, text))
            }
            None => Frame::Welcome(Welcome { model: self.model, dtypes: WireDtype::ALL.to_vec(), max_rows: MAX_ROWS }),
        }
    }

    fn check_model(&self, model: ModelId) -> Result<(), Refused> {
        if model == self.model {
            return Ok(());
        }
        Err((RefusalCode::ModelMismatch, format!("this peer hosts model {}, not {model}", self.model)))
    }

    /// The experts to compute with.
    fn check_call(&self, call: &ExpertCall) -> Result<Snapshot, Refused> {
        self.check_model(call.model)?;
        if call.hidden_size as usize != self.store.hidden_size() {
            let text = format!("rows of this model have {} values, not {}", self.store.hidden_size(), call.hidden_size);
            return Err((RefusalCode::Malformed, text));
        }
        // Who has given everything back says so, and not that it never had it.
        if let Some(why) = self.draining.get() {
            return Err((RefusalCode::Draining, format!("this peer takes no calls at present: {why}")));
        }
        let experts = self.store.snapshot();
        if let Some(missing) = call.assignments.iter().find(|a| experts.expert(call.layer, a.expert).is_none()) {
            return Err((
                RefusalCode::NotHosted,
                format!("expert {} of layer {} is not here", missing.expert, call.layer),
            ));
        }
        if call.deadline_ms == 0 {
            return Err((RefusalCode::DeadlinePassed, "the deadline had passed on arrival".into()));
        }
        Ok(experts)
    }

    async fn give(&self, fetch: &Fetch, chunks: Arc<Semaphore>) -> Held {
        let refused = |code, text: &str| (Frame::Refusal(Refusal::new(fetch.request_id, code, text)), None);
        match (&self.giving, self.draining.get()) {
            (Some(_), Some(why)) => {
                refused(RefusalCode::Draining, &format!("this peer gives nothing at present: {why}"))
            }
            (Some(giving), None) => giving.answer(fetch, chunks, self.bandwidth.as_ref()).await,
            (None, _) => refused(RefusalCode::NotHosted, "this peer gives out no weights"),
        }
    }

    /// `None` when the client took the call back.
    async fn answer_call(&self, client: PeerId, call: ExpertCall, stream: &mut FrameStream) -> Option<Frame> {
        let id = call.request_id;
        let cancel = CancellationToken::new();
        // Also when this future is dropped: work that nobody waits for is taken out of the queue.
        let _taken_back = cancel.clone().drop_guard();
        let outcome = tokio::select! {
            outcome = self.compute(client, call, cancel) => outcome,
            () = stream.cancelled() => return None,
        };
        Some(outcome.map_or_else(
            |(code, text)| {
                self.counters.refused();
                let retry_after_ms = if code == RefusalCode::Busy { BUSY_RETRY.as_millis() as u32 } else { 0 };
                Frame::Refusal(Refusal { retry_after_ms, ..Refusal::new(id, code, text) })
            },
            Frame::Answer,
        ))
    }

    async fn compute(
        &self,
        client: PeerId,
        call: ExpertCall,
        cancel: CancellationToken,
    ) -> Result<ExpertAnswer, Refused> {
        let experts = self.check_call(&call)?;
        let rows = call.answer_rows();
        let ExpertCall { request_id, hidden_size, dtype, body, .. } = call;
        let pairs = call.assignments.iter().map(|a| a.rows.len()).sum();
        let width = hidden_size as usize;
        let hidden = dtype.decode(&body, call.rows as usize, width);
        let hidden = hidden.map_err(|e| (RefusalCode::Malformed, e.to_string()))?;
        // While the work waits its memory is that of the values alone.
        drop(body);
        self.demand.count(call.layer, &call.assignments, Instant::now());
        let work = Work {
            client,
            layer: call.layer,
            experts,
            hidden_size: width,
            hidden,
            assignments: call.assignments,
            combine: call.combine,
            deadline: Instant::now() + Duration::from_millis(u64::from(call.deadline_ms)),
            cancel,
        };
        let done = self.batcher.run(work).await.map_err(|error| {
            let code = match error {
                WorkError::Full => RefusalCode::Busy,
                WorkError::DeadlinePassed => RefusalCode::DeadlinePassed,
                WorkError::Lent if self.draining.get().is_some() => RefusalCode::Draining,
                WorkError::Lent => RefusalCode::NotHosted,
                WorkError::Device | WorkError::Lost => RefusalCode::Internal,
            };
            (code, error.to_string())
        })?;
        let mut body = Vec::new();
        dtype.encode_into(&done.values, width, &mut body).map_err(|e| (RefusalCode::Internal, e.to_string()))?;
        self.counters.answered(pairs);
        let micros = |duration: Duration| u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        Ok(ExpertAnswer {
            request_id,
            dtype,
            rows: u32::try_from(rows).unwrap_or(u32::MAX),
            hidden_size,
            queue_us: micros(done.queued),
            compute_us: micros(done.computed),
            queued_rows: u32::try_from(self.batcher.queued_pairs()).unwrap_or(u32::MAX),
            body: Bytes::from(body),
        })
    }
}
