//! Manifests: the bytes of the specification, signatures, and what is refused.

use hanse_protocol::{
    Blob, BlobHash, ExpertLayer, ExpertRun, Identity, Locations, Manifest, ManifestError, ManifestFile, SignedManifest,
    TensorDtype, TrunkTensor,
};
use proptest::prelude::*;

use crate::bytes;

fn run(dtype: TensorDtype, values: u64) -> ExpertRun {
    ExpertRun { dtype, values }
}

fn manifest() -> Manifest {
    Manifest {
        family: "olmoe".into(),
        config: "{}".into(),
        files: vec![ManifestFile { name: "tokenizer.json".into(), blob: Blob { hash: BlobHash([1; 32]), bytes: 7 } }],
        hidden_size: 4,
        trunk: vec![
            TrunkTensor { name: "a".into(), dtype: TensorDtype::F32, shape: vec![2, 3], hash: BlobHash([2; 32]) },
            TrunkTensor { name: "b".into(), dtype: TensorDtype::Bf16, shape: vec![4], hash: BlobHash([3; 32]) },
        ],
        experts: vec![ExpertLayer {
            layer: 5,
            runs: vec![run(TensorDtype::F16, 32), run(TensorDtype::F16, 8), run(TensorDtype::F32, 16)],
            hashes: vec![BlobHash([4; 32]), BlobHash([5; 32])],
        }],
    }
}

fn locations() -> Locations {
    Locations {
        files: vec!["model.safetensors".into()],
        trunk: vec![(0, 100), (0, 200)],
        experts: vec![vec![vec![(0, 300), (0, 400), (0, 500)], vec![(0, 600), (0, 700), (0, 800)]]],
    }
}

#[test]
fn a_manifest_has_the_bytes_of_the_specification() {
    let signed = SignedManifest::sign(manifest(), &Identity::generate()).unwrap();
    let (h1, h2, h3, h4, h5) = ("01".repeat(32), "02".repeat(32), "03".repeat(32), "04".repeat(32), "05".repeat(32));
    let expected = bytes(&format!(
        "0200 05000000 6f6c6d6f65 02000000 7b7d
         0100 0e000000 746f6b656e697a65722e6a736f6e 0700000000000000 {h1}
         04000000 02000000
         01000000 61 00 02 0200000000000000 0300000000000000 {h2}
         01000000 62 02 01 0400000000000000 {h3}
         0100 0500 03 01 2000000000000000 01 0800000000000000 00 1000000000000000 0200 {h4} {h5}"
    ));
    assert_eq!(hex::encode(&signed.encode()[96..]), hex::encode(&expected));
    let id = signed.id();
    assert_eq!(id.0, blake3::derive_key("hanse/manifest/1", &expected));
    assert_eq!(id, manifest().id());
    assert_eq!(manifest().expert_blob(5, 1), Some(Blob { hash: BlobHash([5; 32]), bytes: 32 * 2 + 8 * 2 + 16 * 4 }));
    assert_eq!(manifest().trunk_blob("b"), Some(Blob { hash: BlobHash([3; 32]), bytes: 8 }));
}

#[test]
fn a_manifest_survives_both_of_its_forms_and_the_id_does_not_depend_on_who_signs() {
    let signed = SignedManifest::sign(manifest(), &Identity::generate()).unwrap();
    assert_eq!(SignedManifest::decode(&signed.encode()).unwrap(), signed);
    let text = signed.to_json(&locations());
    let (again, places) = SignedManifest::from_json(&text).unwrap();
    assert_eq!((again, places), (signed.clone(), locations()));
    let other = Identity::generate();
    let resigned = SignedManifest::sign(manifest(), &other).unwrap();
    assert_eq!(resigned.id(), signed.id());
    assert_eq!(resigned.publisher(), Some(other.peer_id()));
}

#[test]
fn what_was_changed_after_signing_is_refused() {
    let signed = SignedManifest::sign(manifest(), &Identity::generate()).unwrap();
    let mut encoded = signed.encode();
    *encoded.last_mut().unwrap() ^= 1;
    assert_eq!(SignedManifest::decode(&encoded), Err(ManifestError::Signature));
    let text = signed.to_json(&locations());
    let hash = BlobHash([4; 32]).to_string();
    let changed = text.replace(&hash, &BlobHash([9; 32]).to_string());
    assert_eq!(SignedManifest::from_json(&changed), Err(ManifestError::Signature));
    let text = text.replace("\"format\":2", "\"format\":1");
    assert_eq!(SignedManifest::from_json(&text), Err(ManifestError::Format(1)));
}

#[test]
fn places_that_are_not_as_many_as_an_experts_runs_are_refused() {
    let signed = SignedManifest::sign(manifest(), &Identity::generate()).unwrap();
    let mut places = locations();
    places.experts[0][1].pop();
    let error = SignedManifest::from_json(&signed.to_json(&places)).unwrap_err();
    assert!(error.to_string().contains("layer 5"), "{error}");
}

#[test]
fn rules_are_checked_before_anything_is_signed() {
    let refused = |change: fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        SignedManifest::sign(manifest, &Identity::generate()).unwrap_err()
    };
    let names: [&str; 5] = ["../escape", "", ".hidden", "a/b", "a\\b"];
    for name in names {
        let mut manifest = manifest();
        manifest.files[0].name = name.into();
        assert!(SignedManifest::sign(manifest, &Identity::generate()).is_err(), "{name:?}");
    }
    let _ = refused(|m| m.files[0].blob.bytes = 0);
    let _ = refused(|m| m.trunk.swap(0, 1));
    let _ = refused(|m| m.trunk[0].shape = vec![u64::MAX, u64::MAX]);
    let _ = refused(|m| m.trunk[0].shape = vec![0]);
    let _ = refused(|m| m.experts[0].layer = 5000);
    let _ = refused(|m| m.experts[0].hashes.clear());
    let _ = refused(|m| m.experts[0].runs.clear());
    let _ = refused(|m| m.experts[0].runs[1].values = 0);
    let _ = refused(|m| m.experts[0].runs[1].values = u64::MAX);
    let _ = refused(|m| m.experts[0].runs = vec![m.experts[0].runs[0]; 17]);
    let _ = refused(|m| m.experts.push(m.experts[0].clone()));
    let _ = refused(|m| m.hidden_size = 0);
}

#[test]
fn a_manifest_of_58_layers_of_256_experts_is_small() {
    let hashes = vec![BlobHash([0xab; 32]); 256];
    let layer = |layer| ExpertLayer { layer, hashes: hashes.clone(), ..manifest().experts[0].clone() };
    let large = Manifest { experts: (3..61).map(layer).collect(), ..manifest() };
    let place = vec![(100, 10_000_000_000); 3];
    let places = Locations {
        files: vec!["model-00001-of-00163.safetensors".into(); 163],
        experts: vec![vec![place; 256]; 58],
        ..locations()
    };
    let signed = SignedManifest::sign(large, &Identity::generate()).unwrap();
    assert!(signed.encode().len() < 500_000, "{}", signed.encode().len());
    let text = signed.to_json(&places);
    assert!(text.len() < 2_500_000, "{}", text.len());
    assert_eq!(SignedManifest::from_json(&text).unwrap().0, signed);
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(mut flips in prop::collection::vec((0usize..400, any::<u8>()), 0..8), cut in 0usize..400) {
        let mut encoded = SignedManifest::sign(manifest(), &Identity::generate()).unwrap().encode();
        for (at, value) in flips.drain(..) {
            if let Some(byte) = encoded.get_mut(at) {
                *byte = value;
            }
        }
        encoded.truncate(cut.max(1));
        let _ = SignedManifest::decode(&encoded);
    }
}
