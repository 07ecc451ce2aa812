//! Frames: the messages of the data plane.
//!
//! A frame is a fixed prefix, a small header and a raw body of hidden states, specified byte for byte in `docs/protocol.md`.
//! [`read_frame`] yields only frames that satisfy every rule stated here; [`write_frame`] refuses to send any other.

mod check;
mod error;
mod header;
mod io;
mod limits;
mod prefix;

use bytes::Bytes;

use crate::{BlobHash, Combine, ModelId, WireDtype};

pub use error::{FrameError, Malformed};
pub(crate) use io::{Encoded, read_frame_admitted};
pub use io::{read_frame, write_frame};
pub use limits::{FrameLimits, MAX_CHUNK_BYTES};
pub use prefix::{FrameKind, PREFIX_BYTES, VERSION};

/// One message on the data plane.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// Client to server, on the first stream of a connection.
    Hello(Hello),
    /// Server to client: the answer to [`Frame::Hello`].
    Welcome(Welcome),
    /// Client to server: rows to be run through experts.
    Call(ExpertCall),
    /// Server to client: the answer to [`Frame::Call`].
    Answer(ExpertAnswer),
    /// Server to client: why there is no welcome or no answer.
    Refusal(Refusal),
    /// Client to server: a piece of the model itself is wanted.
    Fetch(Fetch),
    /// Server to client: the answer to [`Frame::Fetch`].
    Chunk(Chunk),
}

/// What a client wants of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Name of the network, at most 128 bytes. Members of another network refuse with [`RefusalCode::NetworkMismatch`].
    pub network: String,
    /// The model whose experts will be called. A server with other weights refuses with [`RefusalCode::ModelMismatch`].
    pub model: ModelId,
}

/// What a server offers on this connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The model served; the one of the hello.
    pub model: ModelId,
    /// Formats understood, best first; one to four, distinct.
    pub dtypes: Vec<WireDtype>,
    /// Most rows one call may carry; at least 1.
    pub max_rows: u32,
}

/// Rows of hidden states, and which experts of one layer each row goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertCall {
    /// Chosen by the client and returned in the answer.
    pub request_id: u64,
    /// The model meant: a call can never be computed with other weights.
    pub model: ModelId,
    /// Layer, counted from 0 over all layers, dense ones included.
    pub layer: u32,
    /// Values in a row; at least 1.
    pub hidden_size: u32,
    /// Rows in the body; at least 1.
    pub rows: u32,
    /// Format of the body, and of the answer's.
    pub dtype: WireDtype,
    /// Who adds the experts' rows up.
    pub combine: Combine,
    /// How long the client will wait, in milliseconds from the arrival of the frame. 0 means it is already too late.
    pub deadline_ms: u32,
    /// At least one; experts strictly ascending.
    pub assignments: Vec<ExpertRows>,
    /// `[rows, hidden_size]` in `dtype`.
    pub body: Bytes,
}

/// The rows that go to one expert.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertRows {
    /// Number of the expert within its layer.
    pub expert: u32,
    /// Rows of the body, strictly ascending; at least one.
    pub rows: Vec<u32>,
    /// The gate's weight for each of `rows`; as many, all finite. With [`Combine::Client`] the server does not use them.
    pub weights: Vec<f32>,
}

/// What the experts made of the rows of a call.
///
/// With [`Combine::Peer`] there is one row per row of the call: the sum over its experts of weight times output, added in
/// ascending expert number. With [`Combine::Client`] there is one row per assignment, unweighted, in the order of the call's
/// `assignments` and of their `rows`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertAnswer {
    /// The one of the call.
    pub request_id: u64,
    /// Format of the body; the one of the call.
    pub dtype: WireDtype,
    /// Rows in the body; [`ExpertCall::answer_rows`].
    pub rows: u32,
    /// Values in a row; the one of the call.
    pub hidden_size: u32,
    /// Microseconds the call waited at the server before computing began.
    pub queue_us: u32,
    /// Microseconds spent computing.
    pub compute_us: u32,
    /// Rows that were waiting at the server when it answered: how busy it is.
    pub queued_rows: u32,
    /// `[rows, hidden_size]` in `dtype`.
    pub body: Bytes,
}

/// What a [`Fetch`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// The encoded [`SignedManifest`](crate::SignedManifest) of the model.
    Manifest,
    /// A blob that the manifest lists.
    Blob(BlobHash),
    /// The chaining values of a blob's groups, see [`GroupTree`](crate::GroupTree).
    Tree(BlobHash),
}

/// Asks for a run of bytes of a model's manifest or weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// Chosen by the client and returned in the chunk.
    pub request_id: u64,
    /// The model meant.
    pub model: ModelId,
    /// Of what.
    pub wanted: Wanted,
    /// First byte.
    pub offset: u64,
    /// How many bytes, 1 to [`MAX_CHUNK_BYTES`]; fewer come at the end.
    pub length: u32,
}

/// A run of bytes. Whoever gets it compares it with its hash before it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The one of the fetch.
    pub request_id: u64,
    /// Length of the whole that this is a part of.
    pub total: u64,
    /// First byte; the one of the fetch.
    pub offset: u64,
    /// The bytes: as many as were asked for, or up to the end.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The one of the call; 0 when the call could not be read, or for a hello.
    pub request_id: u64,
    /// The reason, for programs.
    pub code: RefusalCode,
    /// The reason, for people. At most 1024 bytes are sent; a longer one is cut.
    pub message: String,
    /// When to ask this server again, in milliseconds; 0 where waiting does not help or nothing is known.
    pub retry_after_ms: u32,
}

/// Why a server refuses, and so what the client should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The frame is of a version the server does not speak. Do not ask it again. Ends the stream.
    UnsupportedVersion,
    /// The frame breaks a rule: the client's fault. Do not send the same again, to anyone. Ends the stream.
    Malformed,
    /// A limit was passed. Send less at a time. Ends the stream.
    TooLarge,
    /// The server has other weights. Do not ask it again for this model.
    ModelMismatch,
    /// It does not host one of the experts. Ask another replica, and fetch its advert anew.
    NotHosted,
    /// Its queue is full. Ask another replica; this one after `retry_after_ms`.
    Busy,
    /// The deadline passed before computing was done. Ask another replica.
    DeadlinePassed,
    /// It is leaving. Ask another replica, and this one no more.
    Draining,
    /// It failed through no fault of the client. Ask another replica.
    Internal,
    /// It belongs to another network. Do not ask it again.
    NetworkMismatch,
}

impl ExpertCall {
    /// Rows that the answer has: see [`ExpertAnswer`].
    pub fn answer_rows(&self) -> u64 {
        match self.combine {
            Combine::Peer => u64::from(self.rows),
            Combine::Client => self.assignments.iter().map(|assignment| assignment.rows.len() as u64).sum(),
        }
    }
}

impl Refusal {
    /// A refusal without a hint when to retry.
    pub fn new(request_id: u64, code: RefusalCode, message: impl Into<String>) -> Self {
        Self { request_id, code, message: message.into(), retry_after_ms: 0 }
    }
}

impl RefusalCode {
    /// Whether the stream is of no further use after this refusal, since the server may not have read the frame to its end.
    pub fn ends_stream(self) -> bool {
        matches!(self, Self::UnsupportedVersion | Self::Malformed | Self::TooLarge)
    }
}

impl Frame {
    /// Which frame this is.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::Hello,
            Self::Welcome(_) => FrameKind::Welcome,
            Self::Call(_) => FrameKind::Call,
            Self::Answer(_) => FrameKind::Answer,
            Self::Refusal(_) => FrameKind::Refusal,
            Self::Fetch(_) => FrameKind::Fetch,
            Self::Chunk(_) => FrameKind::Chunk,
        }
    }

    /// The raw hidden states behind the header; empty for kinds that have none.
    pub(crate) fn body(&self) -> Bytes {
        match self {
            Self::Call(call) => call.body.clone(),
            Self::Answer(answer) => answer.body.clone(),
            Self::Chunk(chunk) => chunk.body.clone(),
            Self::Hello(_) | Self::Welcome(_) | Self::Refusal(_) | Self::Fetch(_) => Bytes::new(),
        }
    }

    /// Puts the body behind a header that was read without one.
    fn set_body(&mut self, body: Bytes) {
        match self {
            Self::Call(call) => call.body = body,
            Self::Answer(answer) => answer.body = body,
            Self::Chunk(chunk) => chunk.body = body,
            Self::Hello(_) | Self::Welcome(_) | Self::Refusal(_) | Self::Fetch(_) => {}
        }
    }

    /// Whether `answer` may come back for this frame: right kind, same request, and the shape that was asked for.
    ///
    /// A refusal with request id 0 answers anything, since its sender may not have been able to read the request.
    pub fn is_answered_by(&self, answer: &Frame) -> bool {
        match (self, answer) {
            (Self::Hello(hello), Self::Welcome(welcome)) => hello.model == welcome.model,
            (Self::Hello(_), Self::Refusal(refusal)) => refusal.request_id == 0,
            (Self::Call(call), Self::Answer(answer)) => {
                call.request_id == answer.request_id
                    && call.dtype == answer.dtype
                    && call.hidden_size == answer.hidden_size
                    && call.answer_rows() == u64::from(answer.rows)
            }
            (
                Self::Call(ExpertCall { request_id, .. }) | Self::Fetch(Fetch { request_id, .. }),
                Self::Refusal(refusal),
            ) => refusal.request_id == 0 || refusal.request_id == *request_id,
            (Self::Fetch(fetch), Self::Chunk(chunk)) => {
                fetch.request_id == chunk.request_id
                    && fetch.offset == chunk.offset
                    && u64::from(fetch.length).min(chunk.total.saturating_sub(chunk.offset)) == chunk.body.len() as u64
            }
            _ => false,
        }
    }
}
