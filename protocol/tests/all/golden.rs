//! Frames written out by hand from `docs/protocol.md`.

use bytes::Bytes;
use hanse_protocol::{
    BlobHash, Chunk, Combine, ExpertAnswer, ExpertCall, ExpertRows, Fetch, Frame, Hello, ModelId, Refusal, RefusalCode,
    Wanted, Welcome, WireDtype,
};

use crate::{bytes, decode, encode};

pub(crate) const MODEL: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub(crate) fn model() -> ModelId {
    MODEL.parse().expect("64 digits")
}

pub(crate) fn call() -> ExpertCall {
    ExpertCall {
        request_id: 7,
        model: model(),
        layer: 3,
        hidden_size: 2,
        rows: 2,
        dtype: WireDtype::F16,
        combine: Combine::Peer,
        deadline_ms: 1500,
        assignments: vec![
            ExpertRows { expert: 4, rows: vec![0, 1], weights: vec![0.75, 0.5] },
            ExpertRows { expert: 9, rows: vec![1], weights: vec![0.25] },
        ],
        body: body(&[1.0, -2.0, 0.5, 0.0]),
    }
}

pub(crate) fn answer() -> ExpertAnswer {
    ExpertAnswer {
        request_id: 7,
        dtype: WireDtype::F16,
        rows: 2,
        hidden_size: 2,
        queue_us: 120,
        compute_us: 450,
        queued_rows: 3,
        body: body(&[0.5, 1.5, -1.0, 2.0]),
    }
}

fn body(values: &[f32]) -> Bytes {
    let mut bytes = Vec::new();
    WireDtype::F16.encode_into(values, 2, &mut bytes).expect("small values");
    bytes.into()
}

fn check(frame: Frame, expected: &str) {
    let expected = bytes(expected);
    assert_eq!(hex::encode(encode(&frame).expect("a proper frame")), hex::encode(&expected));
    assert_eq!(decode(&expected).expect("a proper frame"), frame);
}

#[test]
fn hello_has_the_bytes_of_the_specification() {
    check(
        Frame::Hello(Hello { network: "hanse".into(), model: model() }),
        &format!("484e5345 0100 0100 2d000000 00000000  0500000000000000 68616e7365 {MODEL}"),
    );
}

#[test]
fn fetch_has_the_bytes_of_the_specification() {
    let wanted = Wanted::Blob(BlobHash([0xaa; 32]));
    check(
        Frame::Fetch(Fetch { request_id: 8, model: model(), wanted, offset: 1 << 20, length: 4096 }),
        &format!(
            "484e5345 0100 0600 55000000 00000000 0800000000000000 {MODEL} 01 {} 0000100000000000 00100000",
            "aa".repeat(32)
        ),
    );
}

#[test]
fn chunk_has_the_bytes_of_the_specification() {
    let body = Bytes::from_static(&[1, 2, 3]);
    check(
        Frame::Chunk(Chunk { request_id: 8, total: (1 << 20) + 3, offset: 1 << 20, body }),
        "484e5345 0100 0700 18000000 03000000 0800000000000000 0300100000000000 0000100000000000 010203",
    );
}

#[test]
fn welcome_has_the_bytes_of_the_specification() {
    check(
        Frame::Welcome(Welcome { model: model(), dtypes: vec![WireDtype::F32, WireDtype::F16], max_rows: 256 }),
        &format!("484e5345 0100 0200 2e000000 00000000  {MODEL} 0200000000000000 00 01 00010000"),
    );
}

#[test]
fn call_has_the_bytes_of_the_specification() {
    check(
        Frame::Call(call()),
        &format!(
            "484e5345 0100 0300 82000000 08000000
             0700000000000000 {MODEL} 03000000 02000000 02000000 01 00 dc050000 0200000000000000
             04000000 0200000000000000 00000000 01000000 0200000000000000 0000403f 0000003f
             09000000 0100000000000000 01000000 0100000000000000 0000803e
             003c 00c0 0038 0000"
        ),
    );
}

#[test]
fn answer_has_the_bytes_of_the_specification() {
    check(
        Frame::Answer(answer()),
        "484e5345 0100 0400 1d000000 08000000
         0700000000000000 01 02000000 02000000 78000000 c2010000 03000000
         0038 003e 00bc 0040",
    );
}

#[test]
fn refusal_has_the_bytes_of_the_specification() {
    let refusal = Refusal { request_id: 7, code: RefusalCode::Busy, message: "queue full".into(), retry_after_ms: 250 };
    check(
        Frame::Refusal(refusal),
        "484e5345 0100 0500 20000000 00000000
         0700000000000000 0600 0a00000000000000 71756575652066756c6c fa000000",
    );
}

#[test]
fn every_refusal_code_has_its_number() {
    use RefusalCode::*;
    let codes = [
        UnsupportedVersion,
        Malformed,
        TooLarge,
        ModelMismatch,
        NotHosted,
        Busy,
        DeadlinePassed,
        Draining,
        Internal,
        NetworkMismatch,
    ];
    for (number, code) in (1u16..).zip(codes) {
        let bytes = encode(&Frame::Refusal(Refusal::new(0, code, ""))).expect("a proper frame");
        assert_eq!(bytes[24..26], number.to_le_bytes(), "{code:?}");
        assert!(matches!(decode(&bytes), Ok(Frame::Refusal(refusal)) if refusal.code == code));
    }
}

/// The examples of the specification that begin with these hex digits: what stands left of three spaces, without the remarks.
pub(crate) fn examples(begin: &str) -> Vec<Vec<u8>> {
    include_str!("../../../docs/protocol.md")
        .split("```")
        .skip(1)
        .step_by(2)
        .filter(|block| block.trim_start().starts_with(begin))
        .map(|block| {
            let hex_digits = block.lines().filter_map(|line| line.trim_start().split("   ").next());
            bytes(&hex_digits.collect::<Vec<_>>().join(" "))
        })
        .collect()
}

#[test]
fn the_examples_of_the_specification_are_frames() {
    let examples = examples("484e5345");
    assert_eq!(examples.len(), 7, "one for each kind");
    for example in examples {
        let frame = decode(&example).expect("a proper frame");
        assert_eq!(encode(&frame).expect("a proper frame"), example);
        if let Frame::Call(found) = frame {
            assert_eq!(found, call());
        }
    }
}
