//! What the protocol promises, tested through its public interface.

mod adverts;
mod allocation;
mod discovery;
mod dtypes;
mod frame_properties;
mod frames;
mod golden;
mod identities;
mod manifests;
mod relayed;
mod transport;

use hanse_protocol::{Frame, FrameError, FrameLimits, read_frame, write_frame};

#[global_allocator]
static ALLOCATOR: allocation::Counting = allocation::Counting;

/// The frame as bytes.
fn encode(frame: &Frame) -> Result<Vec<u8>, FrameError> {
    block_on(async {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, frame).await?;
        Ok(bytes)
    })
}

/// The first frame in `bytes`, under the protocol's own limits.
fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
    decode_within(bytes, &FrameLimits::default())
}

fn decode_within(mut bytes: &[u8], limits: &FrameLimits) -> Result<Frame, FrameError> {
    block_on(read_frame(&mut bytes, limits))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime").block_on(future)
}

/// Bytes from hex digits; white space is for the reader.
fn bytes(hex_digits: &str) -> Vec<u8> {
    hex::decode(hex_digits.split_whitespace().collect::<String>()).expect("hex digits")
}
