//! What can be wrong with a frame.

use std::io;
use std::time::Duration;

use super::{FrameKind, Refusal, RefusalCode};

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream ended between two frames. Nobody's fault.
    #[error("the stream ended")]
    Closed,
    /// The stream ended inside a frame. The other side's fault, or it died.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The other side gave the stream up: its caller no longer waits.
    #[error("the other side reset the stream")]
    Reset,
    /// A frame took longer than allowed from its first byte to its last.
    #[error("a frame was not complete after {0:?}")]
    TooSlow(Duration),
    /// A frame of another version of the protocol.
    #[error("frame version {found} is not supported, only {}", super::VERSION)]
    UnsupportedVersion {
        /// The version its prefix states.
        found: u16,
    },
    /// A stated limit is passed.
    #[error("{what}: {found} is more than the {max} allowed")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: u64,
        /// How much may be.
        max: u64,
    },
    /// A rule of the protocol is broken: by the sender when reading, by the caller when writing.
    #[error("malformed frame: {0}")]
    Malformed(#[from] Malformed),
    /// An earlier read or write on this stream failed or was dropped half-way, so that frames can no longer be told apart.
    #[error("the stream was left inside a frame and can no longer be used")]
    Poisoned,
    /// The connection failed. Try again on another one.
    #[error("the stream failed: {0}")]
    Io(io::Error),
}

/// The rule that a frame breaks.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// It does not begin with `HNSE`.
    #[error("it begins with {0:02x?}, not with HNSE")]
    Magic([u8; 4]),
    /// No such kind of frame.
    #[error("unknown kind {0}")]
    Kind(u16),
    /// Only calls and answers have a body.
    #[error("{kind:?} with a body of {bytes} bytes")]
    UnexpectedBody {
        /// The frame.
        kind: FrameKind,
        /// Its body.
        bytes: u32,
    },
    /// The header cannot be decoded.
    #[error("undecodable {kind:?} header: {reason}")]
    Header {
        /// The frame.
        kind: FrameKind,
        /// What the decoder says.
        reason: String,
    },
    /// The header is followed by bytes that belong to nothing.
    #[error("{0} bytes after the end of the header")]
    TrailingBytes(usize),
    /// A number that stands for nothing.
    #[error("unknown {what} {found}")]
    UnknownCode {
        /// What it should stand for.
        what: &'static str,
        /// The number.
        found: u32,
    },
    /// Something that must be at least one is none.
    #[error("no {0}")]
    Empty(&'static str),
    /// The body is not `rows * hidden_size` values.
    #[error("a body of {found} bytes, but rows, hidden size and dtype make {expected}")]
    BodyLength {
        /// Bytes there.
        found: u64,
        /// Bytes that the header promises.
        expected: u64,
    },
    /// Experts are not strictly ascending.
    #[error("expert {0} is not above the one before it")]
    ExpertOrder(u32),
    /// The rows of an expert are not strictly ascending.
    #[error("row {row} of expert {expert} is not above the one before it")]
    RowOrder {
        /// The expert.
        expert: u32,
        /// The row.
        row: u32,
    },
    /// A row that the body does not have.
    #[error("row {row} of expert {expert}, but there are only {rows} rows")]
    RowOutOfRange {
        /// The expert.
        expert: u32,
        /// The row.
        row: u32,
        /// Rows there are.
        rows: u32,
    },
    /// Not one weight per row.
    #[error("expert {expert} has {rows} rows and {weights} weights")]
    WeightCount {
        /// The expert.
        expert: u32,
        /// Its rows.
        rows: usize,
        /// Its weights.
        weights: usize,
    },
    /// A weight that is NaN or infinite.
    #[error("a weight of expert {0} is not a finite number")]
    Weight(u32),
    /// The same wire dtype twice.
    #[error("a wire dtype is listed twice")]
    RepeatedDtype,
}

impl FrameError {
    /// The refusal to write back before the stream is closed; `None` where nobody would read it.
    ///
    /// Its request id is 0, since the request could not be read.
    pub fn refusal(&self) -> Option<Refusal> {
        let code = match self {
            Self::UnsupportedVersion { .. } => RefusalCode::UnsupportedVersion,
            Self::TooLarge { .. } => RefusalCode::TooLarge,
            Self::Malformed(_) | Self::TooSlow(_) | Self::Truncated => RefusalCode::Malformed,
            Self::Closed | Self::Reset | Self::Poisoned | Self::Io(_) => return None,
        };
        Some(Refusal::new(0, code, self.to_string()))
    }

    /// Sorts an error of the transport: the end of a stream and a reset have their own variants.
    pub(crate) fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            io::ErrorKind::ConnectionReset => Self::Reset,
            _ => Self::Io(error),
        }
    }

    pub(super) fn limit(what: &'static str, found: u64, max: u32) -> Result<(), Self> {
        if found > u64::from(max) {
            return Err(Self::TooLarge { what, found, max: max.into() });
        }
        Ok(())
    }
}
