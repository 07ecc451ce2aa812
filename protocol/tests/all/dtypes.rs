//! Wire dtypes.

use half::{bf16, f16};
use hanse_protocol::{Combine, DecodeError, WireDtype};
use proptest::collection::vec;
use proptest::prelude::*;

fn encode(dtype: WireDtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    dtype.encode_into(values, &mut bytes).expect("values that fit");
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
    ] {
        assert!(!encode(dtype, &[fits]).is_empty());
        for value in [too_large, -too_large, f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 300];
            values[259] = value;
            let mut out = vec![7];
            let error = dtype.encode_into(&values, &mut out).expect_err("it does not fit");
            assert_eq!((error.index, error.dtype, error.value.to_bits()), (259, dtype, value.to_bits()));
            assert_eq!(out, [7], "nothing is left behind");
        }
    }
}

#[test]
fn a_body_with_nan_or_infinity_is_refused() {
    let nan = DecodeError::NotFinite { index: 1 };
    assert_eq!(WireDtype::F16.decode(&[0, 0, 0, 0x7c], 2), Err(nan));
    assert_eq!(WireDtype::Bf16.decode(&[0, 0, 0x80, 0xff], 2), Err(nan));
    assert_eq!(WireDtype::F32.decode(&[0, 0, 0, 0, 0, 0, 0xc0, 0x7f], 2), Err(nan));
}

#[test]
fn a_body_of_the_wrong_length_is_refused() {
    for dtype in WireDtype::ALL {
        for length in [0, 1, 7, 9, 17] {
            assert!(matches!(dtype.decode(&vec![0; length], 4), Err(DecodeError::Length { values: 4, .. })));
        }
        assert!(dtype.decode(&[], usize::MAX).is_err());
        assert_eq!(dtype.decode(&[], 0), Ok(vec![]));
    }
}

#[test]
fn names_are_read_as_they_are_written() {
    for dtype in WireDtype::ALL {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
    }
    let error = "int3".parse::<WireDtype>().expect_err("no such dtype");
    assert_eq!(error.to_string(), r#"unknown wire dtype "int3", known are f32, f16, bf16"#);
}

#[test]
fn f32_is_added_up_by_the_client_and_the_rest_by_the_peer() {
    assert_eq!(WireDtype::F32.default_combine(), Combine::Client);
    assert_eq!(WireDtype::F16.default_combine(), Combine::Peer);
    assert_eq!(WireDtype::Bf16.default_combine(), Combine::Peer);
}

proptest! {
    #[test]
    fn f32_keeps_every_bit(values in vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 0..700)) {
        let decoded = WireDtype::F32.decode(&encode(WireDtype::F32, &values), values.len()).expect("its own bytes");
        prop_assert!(decoded.iter().map(|v| v.to_bits()).eq(values.iter().map(|v| v.to_bits())));
    }

    #[test]
    fn halves_round_like_the_scalar_conversion(values in vec(-60_000.0f32..60_000.0, 0..700), scale in -30i32..1) {
        let values: Vec<f32> = values.into_iter().map(|v| v * 2f32.powi(scale)).collect();
        let f16s = WireDtype::F16.decode(&encode(WireDtype::F16, &values), values.len()).expect("its own bytes");
        let bf16s = WireDtype::Bf16.decode(&encode(WireDtype::Bf16, &values), values.len()).expect("its own bytes");
        for (index, value) in values.iter().enumerate() {
            prop_assert_eq!(f16s[index].to_bits(), f16::from_f32(*value).to_f32().to_bits());
            prop_assert_eq!(bf16s[index].to_bits(), bf16::from_f32(*value).to_f32().to_bits());
        }
    }
}
