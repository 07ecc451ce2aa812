//! How much one frame may be.

use std::time::Duration;

/// The most a reader accepts. The defaults are the protocol's maxima: a member may set lower ones, never higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Bytes of header. Default 1 MiB.
    pub max_header_bytes: u32,
    /// Bytes of body, of a call and of the answer it asks for. Default 64 MiB.
    pub max_body_bytes: u32,
    /// Rows in a call. Default 8192.
    pub max_rows: u32,
    /// Values in a row. Default 65,536.
    pub max_hidden_size: u32,
    /// Experts in a call. Default 4096.
    pub max_experts: u32,
    /// Rows summed over the experts of a call, and so rows in an answer. Default 65,536.
    pub max_assignments: u32,
    /// How long a frame may take from its first byte to its last. Waiting for the first byte is not limited: an idle stream
    /// costs next to nothing. Default 30 s.
    pub frame_time: Duration,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            max_header_bytes: MAX_HEADER_BYTES,
            max_body_bytes: 64 << 20,
            max_rows: 8192,
            max_hidden_size: 65_536,
            max_experts: 4096,
            max_assignments: 65_536,
            frame_time: Duration::from_secs(30),
        }
    }
}

/// The largest header of any frame: a call with 4096 experts and 65,536 assignments needs 606,274 bytes.
pub(crate) const MAX_HEADER_BYTES: u32 = 1 << 20;
/// Bytes of a network name.
pub(crate) const MAX_NETWORK_BYTES: usize = 128;
/// Bytes of a refusal's message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1024;
/// Bytes of a chunk: one group of a blob.
pub const MAX_CHUNK_BYTES: u32 = 1 << 20;
