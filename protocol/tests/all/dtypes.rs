//! Wire dtypes.

use half::{bf16, f16};
use hanse_protocol::{Combine, DecodeError, WireDtype};
use proptest::collection::vec;
use proptest::prelude::*;

fn encode(dtype: WireDtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    dtype.encode_into(values, values.len(), &mut bytes).expect("values that fit");
    bytes
}

#[test]
fn values_are_little_endian_and_rounded_to_nearest_even() {
    assert_eq!(encode(WireDtype::F32, &[1.0, -0.0]), [0, 0, 0x80, 0x3f, 0, 0, 0, 0x80]);
    // Half-way between two neighbours, once up and once down to the even one.
    assert_eq!(encode(WireDtype::F16, &[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0]), [0x00, 0x3c, 0x02, 0x3c]);
    assert_eq!(encode(WireDtype::Bf16, &[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]), [0x80, 0x3f, 0x82, 0x3f]);
}

#[test]
fn a_value_out_of_range_is_an_error_that_names_it() {
    for (dtype, fits, too_large) in [
        (WireDtype::F16, 65_519.0, 65_520.0),
        (WireDtype::Bf16, 3.389e38, f32::MAX),
        (WireDtype::F32, f32::MAX, f32::INFINITY),
        (WireDtype::Int8, 3.4e38, f32::MAX),
    ] {
        assert!(!encode(dtype, &[fits]).is_empty());
        for value in [too_large, -too_large, f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 300];
            values[259] = value;
            let mut out = vec![7];
            let error = dtype.encode_into(&values, 100, &mut out).expect_err("it does not fit");
            assert_eq!((error.index, error.dtype, error.value.to_bits()), (259, dtype, value.to_bits()));
            assert_eq!(out, [7], "nothing is left behind");
        }
    }
}

#[test]
fn a_body_with_nan_or_infinity_is_refused() {
    let nan = DecodeError::NotFinite { index: 1 };
    assert_eq!(WireDtype::F16.decode(&[0, 0, 0, 0x7c], 1, 2), Err(nan));
    assert_eq!(WireDtype::Bf16.decode(&[0, 0, 0x80, 0xff], 2, 1), Err(nan));
    assert_eq!(WireDtype::F32.decode(&[0, 0, 0, 0, 0, 0, 0xc0, 0x7f], 1, 2), Err(nan));
}

#[test]
fn a_body_of_the_wrong_length_is_refused() {
    for dtype in WireDtype::ALL {
        for length in [0, 1, 7, 9, 17] {
            assert!(matches!(dtype.decode(&vec![0; length], 2, 2), Err(DecodeError::Length { values: 4, .. })));
        }
        for (rows, width) in [(usize::MAX, 1), (1, usize::MAX), (usize::MAX, usize::MAX), (usize::MAX, 33)] {
            assert!(matches!(dtype.decode(&[0; 64], rows, width), Err(DecodeError::Length { .. })));
        }
        assert_eq!(dtype.decode(&[], 0, 7), Ok(vec![]));
        assert_eq!(dtype.decode(&[], 7, 0), Ok(vec![]));
    }
}

#[test]
fn names_are_read_as_they_are_written() {
    for dtype in WireDtype::ALL {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
    }
    let error = "int3".parse::<WireDtype>().expect_err("no such dtype");
    assert_eq!(error.to_string(), r#"unknown wire dtype "int3", known are f32, f16, bf16, int8"#);
}

#[test]
fn f32_is_added_up_by_the_client_and_the_rest_by_the_peer() {
    assert_eq!(WireDtype::F32.default_combine(), Combine::Client);
    assert_eq!(WireDtype::F16.default_combine(), Combine::Peer);
    assert_eq!(WireDtype::Bf16.default_combine(), Combine::Peer);
    assert_eq!(WireDtype::Int8.default_combine(), Combine::Peer);
}

#[test]
fn int8_has_the_bytes_of_the_specification() {
    // 127 / 127 is a bfloat16; half-way cases go to the even neighbour.
    assert_eq!(encode(WireDtype::Int8, &[127.0, -0.5, 1.5, -2.6]), [0x80, 0x3f, 127, 0, 2, 0xfd]);
    // 1 / 127 lies between 0x3c01 and 0x3c02: the scale is rounded up, and the byte that would be 127 is 126.
    assert_eq!(encode(WireDtype::Int8, &[1.0, -1.0]), [0x02, 0x3c, 126, 0x82]);
    assert_eq!(encode(WireDtype::Int8, &[0.0, -0.0]), [0, 0, 0, 0]);
    // A second block after 32 values, and a new one with every row.
    let mut row = [0.0; 33];
    (row[0], row[32]) = (-127.0, 254.0);
    let mut expected = vec![0; 37];
    (expected[1], expected[2]) = (0x3f, 0x81);
    expected[0] = 0x80;
    expected[34..].copy_from_slice(&[0x00, 0x40, 127]);
    assert_eq!(encode(WireDtype::Int8, &row), expected);
    let mut rows = Vec::new();
    WireDtype::Int8.encode_into(&[row, row].concat(), 33, &mut rows).expect("values that fit");
    assert_eq!(rows, [expected.clone(), expected].concat());
    assert_eq!(WireDtype::Int8.decode(&rows, 2, 33), Ok([row, row].concat()));
}

#[test]
fn hostile_scales_are_refused_or_harmless() {
    let nan = |index| Err(DecodeError::NotFinite { index });
    for scale in [0x7f80u16, 0xff80, 0x7fc0, 0xffff] {
        let [low, high] = scale.to_le_bytes();
        assert_eq!(WireDtype::Int8.decode(&[low, high, 0, 1], 1, 2), nan(0), "NaN and infinity, also times 0");
    }
    // Finite, but not what it is multiplied to.
    assert_eq!(WireDtype::Int8.decode(&[0x7f, 0x7f, 1, 127], 1, 2), nan(1));
    // No sender writes a negative scale or -128, yet they are numbers.
    assert_eq!(WireDtype::Int8.decode(&[0x80, 0xbf, 0x80, 3], 1, 2), Ok(vec![128.0, -3.0]));
}

#[test]
fn int8_takes_at_most_0_28_of_the_bytes_of_f32() {
    for width in [32, 192, 2048, 7168] {
        assert!(WireDtype::Int8.row_bytes(width) as f64 <= 0.28 * WireDtype::F32.row_bytes(width) as f64);
    }
    assert_eq!(WireDtype::Int8.row_bytes(usize::MAX), usize::MAX);
}

proptest! {
    #[test]
    fn f32_keeps_every_bit(values in vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 0..700)) {
        let decoded = WireDtype::F32.decode(&encode(WireDtype::F32, &values), 1, values.len()).expect("its own bytes");
        prop_assert!(decoded.iter().map(|v| v.to_bits()).eq(values.iter().map(|v| v.to_bits())));
    }

    #[test]
    fn halves_round_like_the_scalar_conversion(values in vec(-60_000.0f32..60_000.0, 0..700), scale in -30i32..1) {
        let values: Vec<f32> = values.into_iter().map(|v| v * 2f32.powi(scale)).collect();
        let f16s = WireDtype::F16.decode(&encode(WireDtype::F16, &values), 1, values.len()).expect("its own bytes");
        let bf16s = WireDtype::Bf16.decode(&encode(WireDtype::Bf16, &values), 1, values.len()).expect("its own bytes");
        for (index, value) in values.iter().enumerate() {
            prop_assert_eq!(f16s[index].to_bits(), f16::from_f32(*value).to_f32().to_bits());
            prop_assert_eq!(bf16s[index].to_bits(), bf16::from_f32(*value).to_f32().to_bits());
        }
    }

    #[test]
    fn int8_is_off_by_at_most_half_a_step(
        values in vec(-1.0f32..1.0, 1..200), width in 1usize..70, scale in -120i32..120,
    ) {
        let values: Vec<f32> = values.into_iter().map(|v| v * 2f32.powi(scale)).collect();
        let rows = values.len() / width;
        let values = &values[..rows * width];
        let send = |values: &[f32]| {
            let mut bytes = Vec::new();
            WireDtype::Int8.encode_into(values, width, &mut bytes).expect("values that fit");
            WireDtype::Int8.decode(&bytes, rows, width).expect("its own bytes")
        };
        let sent = send(values);
        for (row, sent) in values.chunks(width).zip(sent.chunks(width)) {
            for (block, sent) in row.chunks(32).zip(sent.chunks(32)) {
                let top = block.iter().fold(0f32, |top, value| top.max(value.abs()));
                // Half a step, which is up to 1/128 longer as scales are rounded up.
                let half = top / 127.0 * (1.0 + 1.0 / 128.0) / 2.0;
                // The smallest scales are as far apart as the least of them is large.
                let least = f32::from_bits(1 << 16);
                for (value, sent) in block.iter().zip(sent) {
                    prop_assert!((value - sent).abs() <= half * 1.0001 + least, "{} became {}", value, sent);
                }
            }
        }
    }
}
