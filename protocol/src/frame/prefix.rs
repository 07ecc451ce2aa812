//! The sixteen bytes every frame begins with, in every version of the protocol.

use super::{FrameError, FrameLimits, Malformed};

/// Version of the frames written here, and the only one read.
pub const VERSION: u16 = 1;
/// Length of the prefix.
pub const PREFIX_BYTES: usize = 16;

const MAGIC: [u8; 4] = *b"HNSE";

/// The kind of a frame, as the prefix names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// 1
    Hello,
    /// 2
    Welcome,
    /// 3
    Call,
    /// 4
    Answer,
    /// 5
    Refusal,
    /// 6
    Fetch,
    /// 7
    Chunk,
}

impl FrameKind {
    const ALL: [Self; 7] =
        [Self::Hello, Self::Welcome, Self::Call, Self::Answer, Self::Refusal, Self::Fetch, Self::Chunk];

    fn code(self) -> u16 {
        match self {
            Self::Hello => 1,
            Self::Welcome => 2,
            Self::Call => 3,
            Self::Answer => 4,
            Self::Refusal => 5,
            Self::Fetch => 6,
            Self::Chunk => 7,
        }
    }

    fn has_body(self) -> bool {
        matches!(self, Self::Call | Self::Answer | Self::Chunk)
    }
}

/// A prefix whose lengths are within the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) kind: FrameKind,
    pub(super) header_bytes: u32,
    pub(super) body_bytes: u32,
}

impl Prefix {
    pub(super) fn encode(self) -> [u8; PREFIX_BYTES] {
        let mut bytes = [0; PREFIX_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.code().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.header_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }

    pub(super) fn parse(bytes: [u8; PREFIX_BYTES], limits: &FrameLimits) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, h0, h1, h2, h3, b0, b1, b2, b3] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(Malformed::Magic([m0, m1, m2, m3]).into());
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(FrameError::UnsupportedVersion { found: version });
        }
        let code = u16::from_le_bytes([k0, k1]);
        let kind = FrameKind::ALL.into_iter().find(|kind| kind.code() == code).ok_or(Malformed::Kind(code))?;
        let header_bytes = u32::from_le_bytes([h0, h1, h2, h3]);
        let body_bytes = u32::from_le_bytes([b0, b1, b2, b3]);
        FrameError::limit("header bytes", header_bytes.into(), limits.max_header_bytes)?;
        FrameError::limit("body bytes", body_bytes.into(), limits.max_body_bytes)?;
        if body_bytes > 0 && !kind.has_body() {
            return Err(Malformed::UnexpectedBody { kind, bytes: body_bytes }.into());
        }
        Ok(Self { kind, header_bytes, body_bytes })
    }
}
