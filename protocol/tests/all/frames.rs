//! What is refused, with which error, and before what is allocated.

use std::time::Duration;

use bytes::Bytes;
use hanse_protocol::{
    Combine, ExpertCall, ExpertRows, Frame, FrameError, FrameLimits, Hello, Malformed, PREFIX_BYTES, Refusal,
    RefusalCode, Welcome, WireDtype, read_frame,
};

use crate::allocation::peak_during;
use crate::golden::{answer, call, model};
use crate::{block_on, decode, decode_within, encode};

/// A call as bytes, with something wrong in it that the writer would not let pass.
fn forged(change: impl FnOnce(&mut Vec<u8>)) -> Result<Frame, FrameError> {
    let mut bytes = encode(&Frame::Call(call())).expect("a proper frame");
    change(&mut bytes);
    decode(&bytes)
}

fn malformed(result: Result<Frame, FrameError>) -> Malformed {
    match result {
        Err(FrameError::Malformed(malformed)) => malformed,
        other => panic!("not malformed: {other:?}"),
    }
}

fn unsendable(change: impl FnOnce(&mut ExpertCall)) -> FrameError {
    let mut call = call();
    change(&mut call);
    encode(&Frame::Call(call)).expect_err("the frame breaks a rule")
}

// Offsets in the golden call.
const HIDDEN_SIZE: usize = PREFIX_BYTES + 44;
const ROWS: usize = HIDDEN_SIZE + 4;
const DTYPE: usize = PREFIX_BYTES + 52;
const COMBINE: usize = DTYPE + 1;
const FIRST_EXPERT: usize = PREFIX_BYTES + 66;
const FIRST_ROWS: usize = FIRST_EXPERT + 12;
const FIRST_WEIGHTS: usize = FIRST_ROWS + 16;

#[test]
fn a_stream_that_ends_between_frames_is_closed() {
    assert!(matches!(decode(&[]), Err(FrameError::Closed)));
}

#[test]
fn a_frame_of_another_version_is_named_and_answered() {
    let error = forged(|bytes| bytes[4] = 2).expect_err("version 2");
    assert!(matches!(error, FrameError::UnsupportedVersion { found: 2 }), "{error}");
    let refusal = error.refusal().expect("it can be answered");
    assert_eq!(refusal.code, RefusalCode::UnsupportedVersion);
    assert!(refusal.message.contains("version 2"), "{}", refusal.message);
}

#[test]
fn random_bytes_are_no_frame() {
    assert!(matches!(malformed(decode(b"GET / HTTP/1.1\r\n\r\n")), Malformed::Magic(magic) if &magic == b"GET "));
}

#[test]
fn unknown_numbers_are_named() {
    assert_eq!(malformed(forged(|b| b[6] = 9)), Malformed::Kind(9));
    assert_eq!(malformed(forged(|b| b[DTYPE] = 7)), Malformed::UnknownCode { what: "dtype", found: 7 });
    assert_eq!(malformed(forged(|b| b[COMBINE] = 2)), Malformed::UnknownCode { what: "combine", found: 2 });
}

#[test]
fn lengths_over_the_limit_are_refused_before_allocating() {
    for (offset, what) in [(8, "header bytes"), (12, "body bytes")] {
        let (result, peak) = peak_during(|| forged(|bytes| bytes[offset..offset + 4].fill(0xff)));
        let error = result.expect_err("4 GiB");
        assert!(matches!(error, FrameError::TooLarge { what: found, .. } if found == what), "{error}");
        assert_eq!(error.refusal().map(|refusal| refusal.code), Some(RefusalCode::TooLarge));
        assert!(peak < 64 << 10, "{peak} bytes held");
    }
}

#[test]
fn a_promised_body_is_not_allocated_before_it_arrives() {
    let (result, peak) = peak_during(|| {
        forged(|bytes| {
            // 8192 rows of 4096 values of two bytes.
            bytes[12..16].copy_from_slice(&(64u32 << 20).to_le_bytes());
            bytes[HIDDEN_SIZE..HIDDEN_SIZE + 4].copy_from_slice(&4096u32.to_le_bytes());
            bytes[ROWS..ROWS + 4].copy_from_slice(&8192u32.to_le_bytes());
        })
    });
    assert!(matches!(result, Err(FrameError::Truncated)));
    assert!(peak < 2 << 20, "{peak} bytes held");
}

#[test]
fn a_header_that_claims_a_million_experts_is_refused_without_allocating_them() {
    for claim in [1 << 17, 1 << 20, 1 << 40, u64::MAX] {
        let (result, peak) =
            peak_during(|| forged(|b| b[FIRST_EXPERT - 8..FIRST_EXPERT].copy_from_slice(&claim.to_le_bytes())));
        assert!(matches!(malformed(result), Malformed::Header { .. }));
        assert!(peak < 2 << 20, "{peak} bytes held");
    }
}

#[test]
fn the_largest_call_passes() {
    let rows = FrameLimits::default().max_rows;
    let assignments =
        (0..4096).map(|expert| ExpertRows { expert, rows: (0..16).collect(), weights: vec![0.5; 16] }).collect();
    let body = Bytes::from(vec![0; rows as usize * 2 * 2]);
    let call = ExpertCall { rows, assignments, body, combine: Combine::Client, ..call() };
    let bytes = encode(&Frame::Call(call.clone())).expect("within the limits");
    assert_eq!(bytes.len(), PREFIX_BYTES + 606_274 + rows as usize * 4);
    assert_eq!(decode(&bytes).expect("within the limits"), Frame::Call(call));
}

#[test]
fn a_body_must_be_rows_times_hidden_size() {
    let mut bytes = encode(&Frame::Call(call())).expect("a proper frame");
    bytes[12] += 2;
    assert_eq!(malformed(decode(&bytes)), Malformed::BodyLength { found: 10, expected: 8 });
    assert!(matches!(unsendable(|call| call.rows = 3), FrameError::Malformed(Malformed::BodyLength { .. })));
    assert!(matches!(
        unsendable(|call| (call.rows, call.hidden_size) = (8192, 65_536)),
        FrameError::TooLarge { what: "body bytes", .. }
    ));
}

#[test]
fn only_calls_and_answers_have_a_body() {
    let mut bytes = encode(&Frame::Hello(Hello { network: "n".into(), model: model() })).expect("a proper frame");
    bytes[12] = 1;
    bytes.push(0);
    assert!(matches!(malformed(decode(&bytes)), Malformed::UnexpectedBody { bytes: 1, .. }));
}

#[test]
fn bytes_behind_the_header_are_refused() {
    let mut bytes = encode(&Frame::Refusal(Refusal::new(1, RefusalCode::Busy, ""))).expect("a proper frame");
    bytes[8] += 3;
    bytes.extend([0; 3]);
    assert_eq!(malformed(decode(&bytes)), Malformed::TrailingBytes(3));
}

#[test]
fn a_call_without_work_is_refused() {
    let unsendable = |change: fn(&mut ExpertCall)| unsendable(change);
    for (error, what) in [
        (unsendable(|call| (call.rows, call.body) = (0, Bytes::new())), "rows"),
        (unsendable(|call| (call.hidden_size, call.body) = (0, Bytes::new())), "values in a row"),
        (unsendable(|call| call.assignments.clear()), "assignments"),
        (unsendable(|call| call.assignments[0].rows.clear()), "rows for an expert"),
    ] {
        assert!(matches!(error, FrameError::Malformed(Malformed::Empty(found)) if found == what), "{what}: {error}");
    }
}

#[test]
fn experts_must_be_ascending_and_distinct() {
    for expert in [9, 10] {
        let result = forged(|bytes| bytes[FIRST_EXPERT..FIRST_EXPERT + 4].copy_from_slice(&u32::to_le_bytes(expert)));
        assert_eq!(malformed(result), Malformed::ExpertOrder(9));
    }
}

#[test]
fn rows_must_be_ascending_distinct_and_in_range() {
    assert_eq!(malformed(forged(|b| b[FIRST_ROWS] = 1)), Malformed::RowOrder { expert: 4, row: 1 });
    assert_eq!(malformed(forged(|b| b[FIRST_ROWS + 4] = 2)), Malformed::RowOutOfRange { expert: 4, row: 2, rows: 2 });
}

#[test]
fn there_is_one_finite_weight_per_row() {
    for weight in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let result = forged(|b| b[FIRST_WEIGHTS..FIRST_WEIGHTS + 4].copy_from_slice(&weight.to_le_bytes()));
        assert_eq!(malformed(result), Malformed::Weight(4));
    }
    let error = unsendable(|call| call.assignments[0].weights.push(1.0));
    assert!(matches!(error, FrameError::Malformed(Malformed::WeightCount { expert: 4, rows: 2, weights: 3 })));
}

#[test]
fn a_member_may_set_lower_limits() {
    let bytes = encode(&Frame::Call(call())).expect("a proper frame");
    let max = FrameLimits::default();
    for (limits, what) in [
        (FrameLimits { max_header_bytes: 100, ..max }, "header bytes"),
        (FrameLimits { max_body_bytes: 7, ..max }, "body bytes"),
        (FrameLimits { max_rows: 1, ..max }, "rows"),
        (FrameLimits { max_hidden_size: 1, ..max }, "values in a row"),
        (FrameLimits { max_experts: 1, ..max }, "experts"),
        (FrameLimits { max_assignments: 2, ..max }, "assignments"),
    ] {
        let error = decode_within(&bytes, &limits).expect_err(what);
        assert!(matches!(error, FrameError::TooLarge { what: found, .. } if found == what), "{what}: {error}");
    }
}

#[test]
fn a_call_whose_answer_would_be_too_large_is_refused() {
    let bytes = encode(&Frame::Call(ExpertCall { combine: Combine::Client, ..call() })).expect("a proper frame");
    let limits = FrameLimits { max_body_bytes: 8, ..FrameLimits::default() };
    let error = decode_within(&bytes, &limits).expect_err("3 rows of 4 bytes come back");
    assert!(matches!(error, FrameError::TooLarge { what: "bytes of the answer's body", found: 12, max: 8 }), "{error}");
}

#[test]
fn hello_and_welcome_are_bounded() {
    let hello = Hello { network: "n".repeat(129), model: model() };
    assert!(matches!(encode(&Frame::Hello(hello)), Err(FrameError::TooLarge { found: 129, max: 128, .. })));
    let welcome = |dtypes: &[WireDtype], max_rows| {
        encode(&Frame::Welcome(Welcome { model: model(), dtypes: dtypes.to_vec(), max_rows }))
    };
    assert!(matches!(welcome(&[], 1), Err(FrameError::Malformed(Malformed::Empty("dtypes")))));
    assert!(matches!(welcome(&[WireDtype::F32], 0), Err(FrameError::Malformed(Malformed::Empty("rows allowed")))));
    assert!(matches!(
        welcome(&[WireDtype::F32, WireDtype::F16, WireDtype::F32], 1),
        Err(FrameError::Malformed(Malformed::RepeatedDtype))
    ));
}

#[test]
fn a_long_message_is_cut_between_characters() {
    let long = "ä".repeat(600);
    let bytes = encode(&Frame::Refusal(Refusal::new(0, RefusalCode::Internal, format!("x{long}")))).expect("it is cut");
    let Ok(Frame::Refusal(refusal)) = decode(&bytes) else { panic!("no refusal") };
    assert_eq!(refusal.message.len(), 1023);
    assert!(long.starts_with(&refusal.message[1..]));
}

#[test]
fn a_frame_that_does_not_end_in_time_is_given_up() {
    let limits = FrameLimits { frame_time: Duration::from_millis(20), ..FrameLimits::default() };
    let error = block_on(async {
        let (mut near, mut far) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut far, b"HNSE").await.expect("there is room");
        read_frame(&mut near, &limits).await.expect_err("nothing follows")
    });
    assert!(matches!(error, FrameError::TooSlow(_)), "{error}");
}

#[test]
fn only_a_fitting_answer_answers() {
    let request = Frame::Call(call());
    let refusal = |id| Frame::Refusal(Refusal::new(id, RefusalCode::Busy, ""));
    assert!(request.is_answered_by(&Frame::Answer(answer())));
    assert!(request.is_answered_by(&refusal(7)) && request.is_answered_by(&refusal(0)));
    assert!(!request.is_answered_by(&refusal(8)) && !request.is_answered_by(&request));
    let by_row = Frame::Call(ExpertCall { combine: Combine::Client, ..call() });
    assert!(!by_row.is_answered_by(&Frame::Answer(answer())), "three rows were asked for");
}
