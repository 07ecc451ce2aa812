//! Headers as bytes. The only file that knows bincode, so that another encoding could replace it.
//!
//! bincode 2 with fixed-size little-endian integers: fields in order without padding, `u64` before a sequence or a string,
//! enumerations as plain integers. `docs/protocol.md` gives the tables.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};
use bytes::Bytes;

use super::limits::{MAX_HEADER_BYTES, MAX_MESSAGE_BYTES};
use super::{
    Chunk, ExpertAnswer, ExpertCall, ExpertRows, Fetch, Frame, FrameError, FrameKind, Hello, Malformed, Refusal,
    RefusalCode, Wanted, Welcome,
};
use crate::{BlobHash, Combine, ModelId, WireDtype};

// The limit also bounds what a decoded header occupies in memory, whatever lengths it claims.
const CONFIG: Configuration<LittleEndian, Fixint, Limit<{ MAX_HEADER_BYTES as usize }>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit();

#[derive(Encode, Decode)]
struct HelloHeader {
    network: String,
    model: [u8; 32],
}

#[derive(Encode, Decode)]
struct WelcomeHeader {
    model: [u8; 32],
    dtypes: Vec<u8>,
    max_rows: u32,
}

// Written from borrowed rows and weights, read into owned ones.
#[derive(Encode, Decode)]
struct CallHeader<R, W> {
    request_id: u64,
    model: [u8; 32],
    layer: u32,
    hidden_size: u32,
    rows: u32,
    dtype: u8,
    combine: u8,
    deadline_ms: u32,
    assignments: Vec<AssignmentHeader<R, W>>,
}

#[derive(Encode, Decode)]
struct AssignmentHeader<R, W> {
    expert: u32,
    rows: R,
    weights: W,
}

#[derive(Encode, Decode)]
struct AnswerHeader {
    request_id: u64,
    dtype: u8,
    rows: u32,
    hidden_size: u32,
    queue_us: u32,
    compute_us: u32,
    queued_rows: u32,
}

#[derive(Encode, Decode)]
struct RefusalHeader {
    request_id: u64,
    code: u16,
    message: String,
    retry_after_ms: u32,
}

#[derive(Encode, Decode)]
struct FetchHeader {
    request_id: u64,
    model: [u8; 32],
    wanted: u8,
    hash: [u8; 32],
    offset: u64,
    length: u32,
}

#[derive(Encode, Decode)]
struct ChunkHeader {
    request_id: u64,
    total: u64,
    offset: u64,
}

impl Frame {
    /// Appends the header to `out`.
    pub(super) fn encode_header(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Hello(hello) => {
                append(self.kind(), &HelloHeader { network: hello.network.clone(), model: hello.model.0 }, out)
            }
            Self::Welcome(welcome) => {
                let dtypes = welcome.dtypes.iter().map(|dtype| dtype.code()).collect();
                append(self.kind(), &WelcomeHeader { model: welcome.model.0, dtypes, max_rows: welcome.max_rows }, out)
            }
            Self::Call(call) => append(self.kind(), &CallHeader::from(call), out),
            Self::Answer(answer) => append(self.kind(), &AnswerHeader::from(answer), out),
            Self::Refusal(refusal) => append(self.kind(), &RefusalHeader::from(refusal), out),
            Self::Fetch(fetch) => append(self.kind(), &FetchHeader::from(fetch), out),
            Self::Chunk(chunk) => {
                let Chunk { request_id, total, offset, .. } = *chunk;
                append(self.kind(), &ChunkHeader { request_id, total, offset }, out)
            }
        }
    }

    /// Decodes a header, with an empty body. The rules between fields are not yet checked.
    pub(super) fn decode_header(kind: FrameKind, header: &[u8]) -> Result<Self, Malformed> {
        Ok(match kind {
            FrameKind::Hello => {
                let header: HelloHeader = parse(kind, header)?;
                Self::Hello(Hello { network: header.network, model: ModelId(header.model) })
            }
            FrameKind::Welcome => {
                let header: WelcomeHeader = parse(kind, header)?;
                let dtypes = header.dtypes.into_iter().map(dtype).collect::<Result<_, _>>()?;
                Self::Welcome(Welcome { model: ModelId(header.model), dtypes, max_rows: header.max_rows })
            }
            FrameKind::Call => Self::Call(parse::<CallHeader<Vec<u32>, Vec<f32>>>(kind, header)?.try_into()?),
            FrameKind::Answer => Self::Answer(parse::<AnswerHeader>(kind, header)?.try_into()?),
            FrameKind::Refusal => {
                let header: RefusalHeader = parse(kind, header)?;
                let mut message = header.message;
                cut(&mut message);
                Self::Refusal(Refusal {
                    request_id: header.request_id,
                    code: refusal_code(header.code)?,
                    message,
                    retry_after_ms: header.retry_after_ms,
                })
            }
            FrameKind::Fetch => Self::Fetch(parse::<FetchHeader>(kind, header)?.try_into()?),
            FrameKind::Chunk => {
                let ChunkHeader { request_id, total, offset } = parse(kind, header)?;
                Self::Chunk(Chunk { request_id, total, offset, body: Bytes::new() })
            }
        })
    }
}

fn append(kind: FrameKind, header: &impl Encode, out: &mut Vec<u8>) -> Result<(), FrameError> {
    bincode::encode_into_std_write(header, out, CONFIG)
        .map_err(|error| Malformed::Header { kind, reason: error.to_string() })?;
    Ok(())
}

fn parse<T: Decode<()>>(kind: FrameKind, bytes: &[u8]) -> Result<T, Malformed> {
    let (header, used) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|error| Malformed::Header { kind, reason: error.to_string() })?;
    match bytes.len() - used {
        0 => Ok(header),
        trailing => Err(Malformed::TrailingBytes(trailing)),
    }
}

impl<'a> From<&'a ExpertCall> for CallHeader<&'a [u32], &'a [f32]> {
    fn from(call: &'a ExpertCall) -> Self {
        Self {
            request_id: call.request_id,
            model: call.model.0,
            layer: call.layer,
            hidden_size: call.hidden_size,
            rows: call.rows,
            dtype: call.dtype.code(),
            combine: match call.combine {
                Combine::Peer => 0,
                Combine::Client => 1,
            },
            deadline_ms: call.deadline_ms,
            assignments: call
                .assignments
                .iter()
                .map(|a| AssignmentHeader { expert: a.expert, rows: &a.rows[..], weights: &a.weights[..] })
                .collect(),
        }
    }
}

impl TryFrom<CallHeader<Vec<u32>, Vec<f32>>> for ExpertCall {
    type Error = Malformed;

    fn try_from(header: CallHeader<Vec<u32>, Vec<f32>>) -> Result<Self, Malformed> {
        Ok(Self {
            request_id: header.request_id,
            model: ModelId(header.model),
            layer: header.layer,
            hidden_size: header.hidden_size,
            rows: header.rows,
            dtype: dtype(header.dtype)?,
            combine: match header.combine {
                0 => Combine::Peer,
                1 => Combine::Client,
                found => return Err(Malformed::UnknownCode { what: "combine", found: found.into() }),
            },
            deadline_ms: header.deadline_ms,
            assignments: header
                .assignments
                .into_iter()
                .map(|a| ExpertRows { expert: a.expert, rows: a.rows, weights: a.weights })
                .collect(),
            body: Bytes::new(),
        })
    }
}

impl From<&ExpertAnswer> for AnswerHeader {
    fn from(answer: &ExpertAnswer) -> Self {
        Self {
            request_id: answer.request_id,
            dtype: answer.dtype.code(),
            rows: answer.rows,
            hidden_size: answer.hidden_size,
            queue_us: answer.queue_us,
            compute_us: answer.compute_us,
            queued_rows: answer.queued_rows,
        }
    }
}

impl TryFrom<AnswerHeader> for ExpertAnswer {
    type Error = Malformed;

    fn try_from(header: AnswerHeader) -> Result<Self, Malformed> {
        Ok(Self {
            request_id: header.request_id,
            dtype: dtype(header.dtype)?,
            rows: header.rows,
            hidden_size: header.hidden_size,
            queue_us: header.queue_us,
            compute_us: header.compute_us,
            queued_rows: header.queued_rows,
            body: Bytes::new(),
        })
    }
}

impl From<&Refusal> for RefusalHeader {
    fn from(refusal: &Refusal) -> Self {
        let mut message = refusal.message.clone();
        cut(&mut message);
        Self {
            request_id: refusal.request_id,
            code: code_number(refusal.code),
            message,
            retry_after_ms: refusal.retry_after_ms,
        }
    }
}

impl From<&Fetch> for FetchHeader {
    fn from(fetch: &Fetch) -> Self {
        let (wanted, hash) = match fetch.wanted {
            Wanted::Manifest => (0, [0; 32]),
            Wanted::Blob(hash) => (1, hash.0),
            Wanted::Tree(hash) => (2, hash.0),
        };
        Self {
            request_id: fetch.request_id,
            model: fetch.model.0,
            wanted,
            hash,
            offset: fetch.offset,
            length: fetch.length,
        }
    }
}

impl TryFrom<FetchHeader> for Fetch {
    type Error = Malformed;

    fn try_from(header: FetchHeader) -> Result<Self, Malformed> {
        let hash = BlobHash(header.hash);
        Ok(Self {
            request_id: header.request_id,
            model: ModelId(header.model),
            wanted: match header.wanted {
                // A manifest has no hash but the model's id: the field is not looked at.
                0 => Wanted::Manifest,
                1 => Wanted::Blob(hash),
                2 => Wanted::Tree(hash),
                found => return Err(Malformed::UnknownCode { what: "kind of fetch", found: found.into() }),
            },
            offset: header.offset,
            length: header.length,
        })
    }
}

fn cut(message: &mut String) {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message.truncate(end);
}

fn dtype(code: u8) -> Result<WireDtype, Malformed> {
    WireDtype::from_code(code).ok_or(Malformed::UnknownCode { what: "dtype", found: code.into() })
}

fn code_number(code: RefusalCode) -> u16 {
    match code {
        RefusalCode::UnsupportedVersion => 1,
        RefusalCode::Malformed => 2,
        RefusalCode::TooLarge => 3,
        RefusalCode::ModelMismatch => 4,
        RefusalCode::NotHosted => 5,
        RefusalCode::Busy => 6,
        RefusalCode::DeadlinePassed => 7,
        RefusalCode::Draining => 8,
        RefusalCode::Internal => 9,
        RefusalCode::NetworkMismatch => 10,
    }
}

fn refusal_code(number: u16) -> Result<RefusalCode, Malformed> {
    Ok(match number {
        1 => RefusalCode::UnsupportedVersion,
        2 => RefusalCode::Malformed,
        3 => RefusalCode::TooLarge,
        4 => RefusalCode::ModelMismatch,
        5 => RefusalCode::NotHosted,
        6 => RefusalCode::Busy,
        7 => RefusalCode::DeadlinePassed,
        8 => RefusalCode::Draining,
        9 => RefusalCode::Internal,
        10 => RefusalCode::NetworkMismatch,
        found => return Err(Malformed::UnknownCode { what: "refusal code", found: found.into() }),
    })
}
