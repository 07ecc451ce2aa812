//! Adverts and the sets of experts in them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hanse_protocol::discovery::Reachability;
use hanse_protocol::{
    ASSUMED_LIFETIME, Advert, AdvertError, Draining, HostedError, HostedExperts, Identity, MAX_ADVERT_BYTES, ModelId,
    Precision, SignedAdvert, WireDtype, verify_signature,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::bytes;
use crate::golden::model;

const NOW: u64 = 1_800_000_000_000;

fn advert() -> Advert {
    let mut hosted = HostedExperts::new();
    for (layer, expert) in [(0, 0), (0, 9), (5, 7)] {
        hosted.insert(layer, expert).expect("in range");
    }
    Advert {
        model: model(),
        hosted,
        wire_dtypes: vec![WireDtype::F32, WireDtype::Bf16],
        data_addresses: vec!["192.0.2.7:4700".parse().expect("v4"), "[2001:db8::7]:4701".parse().expect("v6")],
        capacity_rows: 1024,
        load_permille: 250,
        draining: None,
        sequence: 3,
        expires_unix_ms: NOW + 300_000,
        layers: [(0, 16), (5, 8)].into(),
        popularity: vec![1, 15, 3],
        loading: HostedExperts::new(),
        reachability: Reachability::Relayed,
        circuits: vec!["/ip4/192.0.2.1/udp/4001/quic-v1/p2p-circuit".parse().expect("a multiaddr")],
        precision: Precision::Q8_0,
        variant_of: Some(ModelId([0xaa; 32])),
    }
}

/// The layers of the largest model that can be said.
fn all_layers() -> BTreeMap<u32, u32> {
    (0..1024).map(|layer| (layer, 4096)).collect()
}

fn refused(change: impl FnOnce(&mut Advert)) -> AdvertError {
    let mut advert = advert();
    change(&mut advert);
    SignedAdvert::sign(&advert, &Identity::generate()).expect_err("a bad advert")
}

/// Bytes at the end of an advert that say how experts are stored, and of what they are a variant.
const VARIANT: usize = 34;

/// An advert with these bytes, properly signed.
fn forged(identity: &Identity, advert: &[u8]) -> SignedAdvert {
    let signature = identity.sign("hanse/advert/1", advert).to_bytes();
    let bytes = [&identity.public_key()[..], &signature, advert].concat();
    SignedAdvert::decode(&bytes).expect("long enough")
}

const GOLDEN: &str = "0200 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f
    0200  0000 0200 01 02  0500 0100 80
    02 00 02
    02  04 c0000207 5c12  06 20010db8000000000000000000000007 5d12
    00040000 fa00 00 0300000000000000 e0e36018a3010000
    0200  0000 1000  0500 0800
    01 f1 03  0000
    01 01 0d 04c0000201 91020fa1 cd03 a202
    03  01 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

#[test]
fn an_advert_has_the_bytes_of_the_specification() {
    let identity = Identity::generate();
    let signed = SignedAdvert::sign(&advert(), &identity).expect("a proper advert").encode();
    assert_eq!(signed[..32], identity.public_key());
    assert_eq!(hex::encode(&signed[96..]), hex::encode(bytes(GOLDEN)));
    assert_eq!(crate::golden::examples("0200 "), [bytes(GOLDEN)], "and so has the example there");
}

#[test]
fn a_signed_advert_tells_who_made_it() {
    let identity = Identity::generate();
    let bytes = SignedAdvert::sign(&advert(), &identity).expect("a proper advert").encode();
    let verified = SignedAdvert::decode(&bytes).and_then(|signed| signed.verify(NOW));
    assert_eq!(verified, Ok((identity.peer_id(), advert())));
}

#[test]
fn why_a_member_takes_no_calls_is_told_and_unknown_reasons_are_refused() {
    let identity = Identity::generate();
    let encoded = |draining| {
        let advert = Advert { draining, ..advert() };
        let bytes = SignedAdvert::sign(&advert, &identity).expect("a proper advert").encode();
        let verified = SignedAdvert::decode(&bytes).and_then(|signed| signed.verify(NOW));
        assert_eq!(verified, Ok((identity.peer_id(), advert)));
        bytes[96..].to_vec()
    };
    let plain = encoded(None);
    let codes: Vec<u8> = Draining::ALL
        .into_iter()
        .map(|why| {
            let told = encoded(Some(why));
            let differs: Vec<usize> = (0..told.len()).filter(|&at| told[at] != plain[at]).collect();
            let [at] = differs[..] else { panic!("one byte tells {why}: {differs:?}") };
            assert_eq!(plain[at], 0);
            for unknown in [6, 255] {
                let mut other = told.clone();
                other[at] = unknown;
                assert_eq!(forged(&identity, &other).verify(NOW), Err(AdvertError::OutOfRange("draining")));
            }
            told[at]
        })
        .collect();
    assert_eq!(codes, [1, 2, 3, 4, 5]);
}

#[test]
fn an_advert_in_another_name_is_refused() {
    let mut bytes = SignedAdvert::sign(&advert(), &Identity::generate()).expect("a proper advert").encode();
    bytes[..32].copy_from_slice(&Identity::generate().public_key());
    assert_eq!(SignedAdvert::decode(&bytes).and_then(|s| s.verify(NOW)), Err(AdvertError::Signature));
}

#[test]
fn a_signature_for_another_purpose_is_worth_nothing() {
    let identity = Identity::generate();
    let signature = identity.sign("hanse/manifest/1", b"message").to_bytes();
    assert!(verify_signature(&identity.public_key(), "hanse/manifest/1", b"message", &signature));
    assert!(!verify_signature(&identity.public_key(), "hanse/advert/1", b"message", &signature));
    assert!(!verify_signature(&identity.public_key(), "hanse/manifest/1", b"massage", &signature));
}

#[test]
fn an_advert_is_true_for_its_time_only() {
    let signed = SignedAdvert::sign(&advert(), &Identity::generate()).expect("a proper advert");
    let expires = advert().expires_unix_ms;
    assert!(signed.verify(expires - 1).is_ok());
    assert_eq!(signed.verify(expires), Err(AdvertError::Expired(Duration::ZERO)));
    assert_eq!(signed.verify(expires + 1500), Err(AdvertError::Expired(Duration::from_millis(1500))));
    let day = Duration::from_secs(24 * 60 * 60);
    assert_eq!(signed.verify(expires - day.as_millis() as u64), Err(AdvertError::TooFarAhead(day)));
    assert!(matches!(signed.verify(u64::MAX), Err(AdvertError::Expired(_))));
    assert!(matches!(signed.verify(0), Err(AdvertError::TooFarAhead(_))));
}

#[test]
fn an_advert_from_its_author_counts_although_a_clock_is_wrong() {
    let identity = Identity::generate();
    let signed = SignedAdvert::sign(&advert(), &identity).expect("a proper advert");
    assert_eq!(signed.verify_from(identity.peer_id(), NOW), Ok((advert(), None)));
    let hour = 60 * 60 * 1000;
    for now in [NOW - hour, NOW + hour] {
        let (believed, wrong) = signed.verify_from(identity.peer_id(), now).expect("fresh from its author");
        assert!(matches!(wrong, Some(AdvertError::Expired(_) | AdvertError::TooFarAhead(_))), "{wrong:?}");
        assert_eq!(believed.expires_unix_ms, now + ASSUMED_LIFETIME.as_millis() as u64);
        assert_eq!(believed.hosted, advert().hosted);
    }
    let other = Identity::generate().peer_id();
    assert_eq!(signed.verify_from(other, NOW), Err(AdvertError::OtherAuthor(identity.peer_id())));
}

#[test]
fn addresses_that_cannot_be_dialled_are_refused() {
    for address in ["0.0.0.0:1", "[::]:1", "192.0.2.7:0", "224.0.0.1:1", "255.255.255.255:1", "[ff02::1]:1"] {
        let address = address.parse().expect("an address");
        assert_eq!(refused(|advert| advert.data_addresses.push(address)), AdvertError::BadAddress(address));
    }
    let address = "192.0.2.7:1".parse().expect("an address");
    assert_eq!(refused(|advert| advert.data_addresses = vec![address; 17]), AdvertError::TooManyAddresses(17));
}

#[test]
fn circuits_that_are_none_or_too_many_or_too_long_are_refused() {
    let circuit = advert().circuits.remove(0);
    assert_eq!(refused(|advert| advert.circuits = vec![circuit.clone(); 5]), AdvertError::BadCircuit);
    let direct = "/ip4/192.0.2.1/udp/4001/quic-v1".parse().expect("a multiaddr");
    assert_eq!(refused(|advert| advert.circuits.push(direct)), AdvertError::BadCircuit);
    let long = format!("/dns4/{}/udp/4001/quic-v1/p2p-circuit", "x".repeat(250)).parse().expect("a multiaddr");
    assert_eq!(refused(|advert| advert.circuits.push(long)), AdvertError::BadCircuit);
}

#[test]
fn fields_out_of_range_are_refused() {
    assert!(matches!(refused(|a| a.load_permille = 1001), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| a.wire_dtypes.clear()), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| a.wire_dtypes = vec![WireDtype::F32; 2]), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| _ = a.layers.insert(7, 0)), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| _ = a.layers.insert(7, 4097)), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| _ = a.layers.insert(1024, 8)), AdvertError::OutOfRange(_)));
    assert_eq!(refused(|a| _ = a.layers.insert(5, 7)), AdvertError::NotInModel { layer: 5, expert: 7 });
    assert_eq!(refused(|a| a.loading.insert(6, 1).expect("in range")), AdvertError::NotInModel { layer: 6, expert: 1 });
    assert!(matches!(refused(|a| a.popularity = vec![1, 2]), AdvertError::OutOfRange(_)));
    assert!(matches!(refused(|a| a.popularity = vec![1, 16, 2]), AdvertError::OutOfRange(_)));
}

#[test]
fn popularity_doubles_with_every_step() {
    use hanse_protocol::{popularity, rows_per_minute};
    for (rows, step) in [(0.0, 0), (0.9, 0), (1.0, 1), (1.9, 1), (2.0, 2), (16384.0, 15), (1e300, 15), (f64::NAN, 0)] {
        assert_eq!(popularity(rows), step, "{rows}");
    }
    for step in 0..=15 {
        assert_eq!(popularity(rows_per_minute(step)), step);
    }
}

#[test]
fn bad_bytes_under_a_good_signature_are_refused() {
    let identity = Identity::generate();
    let good = bytes(GOLDEN);
    let verify = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        forged(&identity, &bytes).verify(NOW).map(|_| ())
    };
    assert_eq!(verify(&|_| {}), Ok(()));
    assert_eq!(verify(&|b| b[0] = 1), Err(AdvertError::Format(1)));
    assert_eq!(verify(&|b| b.push(0)), Err(AdvertError::TrailingBytes(1)));
    assert_eq!(verify(&|b| b.truncate(40)), Err(AdvertError::Truncated));
    assert_eq!(verify(&|b| b[34..36].fill(0xff)), Err(HostedError::Layer(0xffff).into()));
    assert_eq!(verify(&|b| b[41] = 0), Err(HostedError::Bitmap(0).into()), "the last byte says nothing");
    assert_eq!(verify(&|b| b[42] = 0), Err(HostedError::LayerOrder(0).into()));
    assert_eq!(
        verify(&|b| {
            let at = b.len() - 25 - VARIANT;
            b[at] = 0;
        }),
        Err(HostedError::LayerOrder(0).into())
    );
    assert_eq!(verify(&|b| b[47] = 5), Err(AdvertError::OutOfRange("list of wire dtypes")));
    assert_eq!(verify(&|b| b[48] = 9), Err(AdvertError::OutOfRange("wire dtype")));
    assert_eq!(verify(&|b| b[50] = 17), Err(AdvertError::TooManyAddresses(17)));
    assert_eq!(verify(&|b| b[51] = 5), Err(AdvertError::OutOfRange("address family")));
    let end = good.len() - VARIANT;
    assert_eq!(verify(&|b| b[end - 21] = 2), Err(AdvertError::OutOfRange("popularity flag")));
    assert_eq!(verify(&|b| b[end - 19] = 0x13), Err(AdvertError::OutOfRange("list of popularities")));
    assert_eq!(verify(&|b| b[end - 16] = 3), Err(AdvertError::OutOfRange("reachability")));
    assert_eq!(verify(&|b| b[end - 15] = 5), Err(AdvertError::BadCircuit));
    assert_eq!(verify(&|b| b[end - 14] = 12), Err(AdvertError::BadCircuit));
    assert_eq!(verify(&|b| b[end - 14] = 14 + VARIANT as u8), Err(AdvertError::Truncated));
    assert_eq!(verify(&|b| b[end] = 7), Err(AdvertError::OutOfRange("precision")));
    assert_eq!(verify(&|b| b[end + 1] = 2), Err(AdvertError::OutOfRange("variant flag")));
    assert_eq!(verify(&|b| b[end + 1] = 0), Err(AdvertError::TrailingBytes(32)));
    assert_eq!(verify(&|b| b.truncate(end + 33)), Err(AdvertError::Truncated));
    let own = AdvertError::OutOfRange("model of which it is a variant");
    assert_eq!(verify(&|b| b.copy_within(2..34, end + 2)), Err(own));
    assert_eq!(verify(&|b| b[52..56].fill(0)), Err(AdvertError::BadAddress("0.0.0.0:4700".parse().expect("v4"))));
}

#[test]
fn the_largest_advert_fits_and_a_larger_one_is_not_read() {
    let mut hosted = HostedExperts::new();
    for layer in 0..1024 {
        hosted.insert(layer, 4095).expect("in range");
    }
    let signed = SignedAdvert::sign(
        &Advert { hosted, layers: all_layers(), popularity: Vec::new(), ..advert() },
        &Identity::generate(),
    )
    .expect("it fits")
    .encode();
    assert!(signed.len() <= MAX_ADVERT_BYTES);
    let error = SignedAdvert::decode(&vec![0; MAX_ADVERT_BYTES + 1]).expect_err("too long");
    assert_eq!(error, AdvertError::TooLong(MAX_ADVERT_BYTES + 1));
    assert_eq!(SignedAdvert::decode(&[0; 95]), Err(AdvertError::Truncated));
}

#[test]
fn layers_and_experts_are_bounded() {
    let mut hosted = HostedExperts::new();
    assert_eq!(hosted.insert(1024, 0), Err(HostedError::Layer(1024)));
    assert_eq!(hosted.insert(0, 4096), Err(HostedError::Expert(4096)));
    assert!(hosted.is_empty() && !hosted.contains(u32::MAX, u32::MAX));
}

#[test]
fn the_highest_expert_of_a_layer_must_be_in_the_model() {
    for expert in 1..40 {
        let mut hosted = HostedExperts::new();
        hosted.insert(5, 0).and_then(|()| hosted.insert(5, expert)).expect("in range");
        let error = refused(|advert| (advert.hosted, advert.layers) = (hosted.clone(), [(5, expert)].into()));
        assert_eq!(error, AdvertError::NotInModel { layer: 5, expert });
        let advert = Advert { hosted, layers: [(5, expert + 1)].into(), popularity: vec![0, 9], ..advert() };
        assert!(SignedAdvert::sign(&advert, &Identity::generate()).is_ok());
    }
}

proptest! {
    #[test]
    fn a_set_of_experts_is_a_set(chosen in btree_set((0u32..1024, 0u32..4096), 0..60)) {
        let mut hosted = HostedExperts::new();
        for (layer, expert) in &chosen {
            hosted.insert(*layer, *expert).expect("in range");
        }
        prop_assert_eq!(hosted.count(), chosen.len());
        prop_assert!(hosted.iter().eq(chosen.iter().copied()));
        let layers: BTreeSet<u32> = chosen.iter().map(|(layer, _)| *layer).collect();
        prop_assert!(hosted.layers().eq(layers.iter().copied()));
        for layer in layers {
            let expected = chosen.range((layer, 0)..(layer + 1, 0)).map(|(_, expert)| *expert);
            prop_assert!(hosted.in_layer(layer).eq(expected));
        }
        let steps: Vec<u8> = (0u8..16).cycle().take(chosen.len()).collect();
        let signed = SignedAdvert::sign(&Advert { layers: chosen.iter().map(|(layer, _)| (*layer, 4096)).collect(), popularity: steps.clone(), loading: hosted.clone(), hosted, ..advert() }, &Identity::generate()).expect("a proper advert");
        let (_, advert) = signed.verify(NOW).expect("its own bytes");
        prop_assert!(advert.hosted == advert.loading && advert.hosted.iter().eq(chosen));
        prop_assert_eq!(advert.popularity, steps);
    }

    #[test]
    fn changed_adverts_never_panic(changes in vec((any::<Index>(), any::<u8>()), 1..4), length in any::<Index>()) {
        let mut bytes = bytes(GOLDEN);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(length.index(bytes.len() + 1));
        let identity = Identity::generate();
        if let Ok((peer, advert)) = forged(&identity, &bytes).verify(NOW) {
            prop_assert_eq!(peer, identity.peer_id());
            prop_assert!(SignedAdvert::sign(&advert, &identity).is_ok(), "what may be read may be written");
        }
    }
}
