//! What holds of all frames and of all bytes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use hanse_protocol::{
    Combine, ExpertAnswer, ExpertCall, ExpertRows, Frame, FrameError, Hello, ModelId, PREFIX_BYTES, Refusal,
    RefusalCode, Welcome, WireDtype,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use crate::allocation::peak_during;
use crate::{decode, encode};

/// What bytes that fit in memory as they are may cost to read at most: the header, its decoded form, and one step of the body.
const READING_COST: usize = 4 << 20;

fn frames() -> impl Strategy<Value = Frame> {
    prop_oneof![hellos(), welcomes(), calls(), answers(), refusals()]
}

fn models() -> impl Strategy<Value = ModelId> {
    any::<[u8; 32]>().prop_map(ModelId)
}

fn dtypes() -> impl Strategy<Value = WireDtype> {
    select(WireDtype::ALL.to_vec())
}

fn hellos() -> impl Strategy<Value = Frame> {
    ("[a-z]{0,20}", models()).prop_map(|(network, model)| Frame::Hello(Hello { network, model }))
}

fn welcomes() -> impl Strategy<Value = Frame> {
    let orders = (1usize..=4)
        .prop_flat_map(|count| Just(WireDtype::ALL.to_vec()).prop_shuffle().prop_map(move |all| all[..count].to_vec()));
    (models(), orders, 1u32..).prop_map(|(model, dtypes, max_rows)| Frame::Welcome(Welcome { model, dtypes, max_rows }))
}

fn calls() -> impl Strategy<Value = Frame> {
    let rest = (any::<u64>(), models(), 0u32..100, any::<bool>(), any::<u32>());
    let shape = (1u32..6, 1u32..9, dtypes());
    (shape, rest)
        .prop_flat_map(|((rows, hidden_size, dtype), rest)| {
            let body = vec(any::<u8>(), rows as usize * dtype.row_bytes(hidden_size as usize));
            let chosen: BoxedStrategy<BTreeMap<u32, BTreeSet<u32>>> =
                btree_map(any::<u32>(), btree_set(0..rows, 1..=rows as usize), 1..5).boxed();
            (Just((rows, hidden_size, dtype)), Just(rest), body, chosen, -2.0f32..2.0)
        })
        .prop_map(|((rows, hidden_size, dtype), rest, body, chosen, weight)| {
            let (request_id, model, layer, client, deadline_ms) = rest;
            let assignments = chosen
                .into_iter()
                .map(|(expert, rows)| ExpertRows {
                    expert,
                    weights: vec![weight; rows.len()],
                    rows: rows.into_iter().collect(),
                })
                .collect();
            Frame::Call(ExpertCall {
                request_id,
                model,
                layer,
                hidden_size,
                rows,
                dtype,
                combine: if client { Combine::Client } else { Combine::Peer },
                deadline_ms,
                assignments,
                body: Bytes::from(body),
            })
        })
}

fn answers() -> impl Strategy<Value = Frame> {
    (any::<u64>(), dtypes(), 1u32..9, 1u32..9, any::<[u32; 3]>(), any::<u8>()).prop_map(
        |(request_id, dtype, rows, hidden_size, [queue_us, compute_us, queued_rows], byte)| {
            let body = vec![byte; rows as usize * dtype.row_bytes(hidden_size as usize)].into();
            Frame::Answer(ExpertAnswer {
                request_id,
                dtype,
                rows,
                hidden_size,
                queue_us,
                compute_us,
                queued_rows,
                body,
            })
        },
    )
}

fn refusals() -> impl Strategy<Value = Frame> {
    let codes = vec![RefusalCode::Busy, RefusalCode::NotHosted, RefusalCode::Internal, RefusalCode::NetworkMismatch];
    (any::<u64>(), select(codes), ".{0,40}", any::<u32>()).prop_map(|(request_id, code, message, retry_after_ms)| {
        Frame::Refusal(Refusal { request_id, code, message, retry_after_ms })
    })
}

proptest! {
    #[test]
    fn a_frame_survives_its_bytes(frame in frames()) {
        let bytes = encode(&frame).expect("a proper frame");
        prop_assert_eq!(decode(&bytes).expect("its own bytes"), frame);
    }

    #[test]
    fn every_truncation_is_an_error(frame in frames(), cut in any::<Index>()) {
        let bytes = encode(&frame).expect("a proper frame");
        let error = decode(&bytes[..cut.index(bytes.len())]).expect_err("a part of a frame");
        prop_assert!(matches!(error, FrameError::Closed | FrameError::Truncated), "{}", error);
    }

    #[test]
    fn random_bytes_never_panic_nor_cost_much(bytes in vec(any::<u8>(), 0..200)) {
        let (result, peak) = peak_during(|| decode(&bytes));
        prop_assert!(result.is_err());
        prop_assert!(peak < READING_COST, "{} bytes held", peak);
    }

    #[test]
    fn random_headers_never_panic_nor_cost_much(kind in 0u8..7, header in vec(any::<u8>(), 0..300), body in 0u8..9) {
        let mut bytes = b"HNSE\x01\x00".to_vec();
        bytes.extend([kind, 0]);
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend([body, 0, 0, 0]);
        bytes.extend(header);
        bytes.extend(vec![0; body.into()]);
        let (_, peak) = peak_during(|| decode(&bytes));
        prop_assert!(peak < READING_COST, "{} bytes held", peak);
    }

    #[test]
    fn changed_frames_never_panic_nor_cost_much(frame in frames(), changes in vec((any::<Index>(), any::<u8>()), 1..4)) {
        let mut bytes = encode(&frame).expect("a proper frame");
        for (at, byte) in changes {
            // The prefix's magic, version and kind stay, so that the header is reached.
            let at = PREFIX_BYTES / 2 + at.index(bytes.len() - PREFIX_BYTES / 2);
            bytes[at] = byte;
        }
        let (result, peak) = peak_during(|| decode(&bytes));
        prop_assert!(peak < READING_COST, "{} bytes held", peak);
        if let Ok(frame) = result {
            prop_assert!(encode(&frame).is_ok(), "what may be read may be written");
        }
    }
}
