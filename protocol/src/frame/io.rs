//! Frames from and to byte streams.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::prefix::Prefix;
use super::{Frame, FrameError, FrameLimits, PREFIX_BYTES};

/// What is allocated for a body before any of it has arrived, and at least at each later step.
const BODY_STEP: usize = 1 << 20;

/// Reads one frame.
///
/// A frame that comes back satisfies every rule of the protocol. Lengths are checked against `limits` before anything is
/// allocated, a body is read only behind a header that is right, and its memory grows with the bytes that really arrive. A future dropped half-way leaves the reader inside a
/// frame, of no further use.
///
/// # Errors
/// [`FrameError::Closed`] when the stream ends before the first byte; the other variants as they say. After any error the
/// position in the stream is unknown: write [`FrameError::refusal`] back, if there is one, and close the stream.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R, limits: &FrameLimits) -> Result<Frame, FrameError> {
    read_frame_admitted(reader, limits, async |_, _| ()).await.map(|(frame, ())| frame)
}

/// Like [`read_frame`], but before it reads a body of so many bytes it asks `admit` for leave to hold so many, those of the answer
/// included.
pub(crate) async fn read_frame_admitted<R: AsyncRead + Unpin, P>(
    reader: &mut R,
    limits: &FrameLimits,
    admit: impl AsyncFnOnce(u32, u64) -> P,
) -> Result<(Frame, P), FrameError> {
    let mut prefix = [0; PREFIX_BYTES];
    let first = reader.read(&mut prefix).await.map_err(FrameError::from_io)?;
    if first == 0 {
        return Err(FrameError::Closed);
    }
    within(limits.frame_time, async {
        if let Some(rest) = prefix.get_mut(first..) {
            reader.read_exact(rest).await.map_err(FrameError::from_io)?;
        }
        let prefix = Prefix::parse(prefix, limits)?;
        let header = read_bytes(reader, prefix.header_bytes).await?;
        let mut frame = Frame::decode_header(prefix.kind, &header)?;
        frame.check(prefix.body_bytes as usize, limits)?;
        let permit = admit(prefix.body_bytes, frame.memory(prefix.body_bytes)).await;
        frame.set_body(read_bytes(reader, prefix.body_bytes).await?.into());
        Ok((frame, permit))
    })
    .await
}

/// Writes one frame.
///
/// A future dropped half-way leaves the writer inside a frame, of no further use.
///
/// # Errors
/// [`FrameError::Malformed`] and [`FrameError::TooLarge`] when `frame` breaks a rule or one of the protocol's maxima: nothing
/// has then been written. [`FrameError::Io`] and [`FrameError::Reset`] when the stream fails.
pub async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> Result<(), FrameError> {
    let Encoded { head, body } = Encoded::new(frame)?;
    writer.write_all(&head).await.map_err(FrameError::from_io)?;
    writer.write_all(&body).await.map_err(FrameError::from_io)?;
    writer.flush().await.map_err(FrameError::from_io)
}

/// A frame ready to be written: one buffer for prefix and header, the body as it was.
#[derive(Debug, Clone)]
pub(crate) struct Encoded {
    pub(crate) head: Bytes,
    pub(crate) body: Bytes,
}

impl Encoded {
    pub(crate) fn new(frame: &Frame) -> Result<Self, FrameError> {
        let limits = FrameLimits::default();
        let body = frame.body();
        frame.check(body.len(), &limits)?;
        let mut head = vec![0; PREFIX_BYTES];
        frame.encode_header(&mut head)?;
        let header_bytes = (head.len() - PREFIX_BYTES) as u64;
        FrameError::limit("header bytes", header_bytes, limits.max_header_bytes)?;
        // Both fit: the limits are `u32`, and `check` has compared the body with them.
        let prefix = Prefix { kind: frame.kind(), header_bytes: header_bytes as u32, body_bytes: body.len() as u32 };
        head[..PREFIX_BYTES].copy_from_slice(&prefix.encode());
        Ok(Self { head: head.into(), body })
    }
}

/// Reads exactly `length` bytes into one allocation that grows as they come.
async fn read_bytes<R: AsyncRead + Unpin>(reader: &mut R, length: u32) -> Result<Vec<u8>, FrameError> {
    let length = length as usize;
    let mut bytes = Vec::with_capacity(length.min(BODY_STEP));
    while bytes.len() < length {
        if bytes.len() == bytes.capacity() {
            // Doubling keeps the copying linear; a liar gets at most twice what it sent, or one step.
            bytes.reserve_exact(bytes.len().max(BODY_STEP).min(length - bytes.len()));
        }
        let room = bytes.capacity().min(length) - bytes.len();
        let read = reader.read_buf(&mut (&mut bytes).limit(room)).await.map_err(FrameError::from_io)?;
        if read == 0 {
            return Err(FrameError::Truncated);
        }
    }
    Ok(bytes)
}

async fn within<T>(time: Duration, work: impl Future<Output = Result<T, FrameError>>) -> Result<T, FrameError> {
    tokio::time::timeout(time, work).await.unwrap_or(Err(FrameError::TooSlow(time)))
}
