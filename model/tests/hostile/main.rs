//! Folders that are wrong in every way we could think of: each gets its own error that names what is wrong.

#[path = "../common/mod.rs"]
mod common;
mod configs;
mod files;
mod values;

use std::path::Path;

use common::{Golden, Local, bits, fixture};
use hanse_model::{
    Checkpoint, CheckpointError, ConfigError, Expert, LoadError, PartHashes, Piece, Tokenizer, Trunk, compute_pool,
    known_families, tensor_shapes, weight_map_of_headers,
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// A copy of a fixture's model files that a test may spoil.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        if file.starts_with("model") || file == "config.json" {
            std::fs::copy(&path, dir.path().join(file)).unwrap();
        }
    }
    dir
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = common::json(path);
    edit(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// The error for a fixture with one key of `config.json` changed; `None` removes it.
fn with_key(name: &str, key: &str, value: Option<Value>) -> CheckpointError {
    let dir = copy(name);
    edit_json(&dir.path().join("config.json"), |config| {
        let map = config.as_object_mut().unwrap();
        match value {
            Some(value) => map.insert(key.into(), value),
            None => map.remove(key),
        };
    });
    Checkpoint::open(dir.path()).expect_err(key)
}

fn open_error(dir: &Path) -> CheckpointError {
    Checkpoint::open(dir).expect_err("the folder is spoilt")
}

struct RawTensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// All tensors of a folder.
fn tensors(dir: &Path) -> Vec<RawTensor> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let bytes = std::fs::read(file).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let dtype = match tensor.dtype() {
                safetensors::Dtype::F32 => "F32",
                other => panic!("{other:?}"),
            };
            found.push(RawTensor { name, dtype, shape: tensor.shape().to_vec(), bytes: tensor.data().to_vec() });
        }
    }
    found
}

/// A safetensors file; `pad` gives the number of spaces after the header for its length.
fn file_bytes(tensors: &[RawTensor], pad: impl Fn(usize) -> usize) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let offsets = [data.len(), data.len() + tensor.bytes.len()];
        let info = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
        header.insert(tensor.name.clone(), info);
        data.extend_from_slice(&tensor.bytes);
    }
    raw_file(Value::from(header).to_string(), &data, pad)
}

fn raw_file(mut header: String, data: &[u8], pad: impl Fn(usize) -> usize) -> Vec<u8> {
    header.push_str(&" ".repeat(pad(header.len())));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

fn aligned(len: usize) -> usize {
    (8 - len % 8) % 8
}

/// Writes the tensors as a single file, in place of shards.
fn write_single(dir: &Path, tensors: &[RawTensor], pad: impl Fn(usize) -> usize) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("model") {
            std::fs::remove_file(path).unwrap();
        }
    }
    std::fs::write(dir.join("model.safetensors"), file_bytes(tensors, pad)).unwrap();
}

#[test]
fn sharded_logits_equal_unsharded_ones() {
    let dir = copy("mixtral");
    let prompt = Golden::open(&fixture("mixtral")).ids("p1.input_ids").unwrap();
    let mut sharded = Local::open(dir.path());
    let expected = bits(&sharded.prefill(&prompt));
    let sizes = sharded.checkpoint.sizes();
    let tensors = tensors(dir.path());
    let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(sizes.trunk_bytes + sizes.expert_bytes, bytes as u64);
    assert_eq!(sizes.bytes_per_expert, [3 * 28 * 32 * 4; 3]);
    // One more byte of header leaves no tensor where its dtype wants it: the values are copied instead of mapped.
    for misalign in [0, 1] {
        write_single(dir.path(), &tensors, |len| aligned(len) + misalign);
        let mut single = Local::open(dir.path());
        assert_eq!(bits(&single.prefill(&prompt)), expected);
    }
}

#[test]
fn an_error_leaves_its_cause_to_the_chain() {
    let error = open_error(Path::new("/nonexistent"));
    let cause = std::error::Error::source(&error).expect("the system's reason").to_string();
    assert!(!error.to_string().contains(&cause), "{error}");
}

#[test]
fn a_shard_that_is_absent_lacks_a_tensor_or_repeats_one_is_named() {
    let dir = copy("mixtral");
    let index = dir.path().join("model.safetensors.index.json");
    let shard = |n: usize| dir.path().join(format!("model-0000{n}-of-00003.safetensors"));
    let bytes = std::fs::read(shard(2)).unwrap();
    std::fs::remove_file(shard(2)).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::MissingFile { path, .. } if path == shard(2)));
    std::fs::copy(shard(1), shard(2)).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::Duplicate { second, .. } if second == shard(2)));
    std::fs::write(shard(2), &bytes).unwrap();
    edit_json(&index, |index| {
        index["weight_map"]["model.layers.9.nothing"] = json!("model-00001-of-00003.safetensors");
    });
    let error = open_error(dir.path());
    assert!(
        matches!(&error, CheckpointError::NotInShard { tensor, .. } if tensor == "model.layers.9.nothing"),
        "{error}"
    );
    for name in ["../model-00001-of-00003.safetensors", "/etc/passwd", "", "..", "a\\b"] {
        edit_json(&index, |index| index["weight_map"]["model.layers.9.nothing"] = json!(name));
        assert!(matches!(open_error(dir.path()), CheckpointError::Index { .. }), "{name}");
    }
    for text in ["{", "{}", r#"{"weight_map": {}}"#, r#"{"weight_map": {"a": 3}}"#] {
        std::fs::write(&index, text).unwrap();
        assert!(matches!(open_error(dir.path()), CheckpointError::Index { .. }), "{text}");
    }
}

#[test]
fn a_missing_misshapen_or_strangely_typed_tensor_is_named() {
    let dir = copy("mixtral");
    let original = tensors(dir.path());
    let name = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    let spoil = |spoil: &dyn Fn(&mut RawTensor)| {
        let mut tensors = tensors(&fixture("mixtral"));
        tensors.iter_mut().filter(|tensor| tensor.name == name).for_each(spoil);
        write_single(dir.path(), &tensors, aligned);
        open_error(dir.path())
    };
    let error = spoil(&|tensor| tensor.name = "something.else".into());
    assert!(matches!(&error, CheckpointError::MissingTensor { tensor } if tensor == name), "{error}");
    let error = spoil(&|tensor| tensor.shape.reverse());
    let CheckpointError::Shape { tensor, expected, found } = &error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), expected.as_slice(), found.as_slice()), (name, &[32, 28][..], &[28, 32][..]));
    let error = spoil(&|tensor| tensor.dtype = "I32");
    assert!(matches!(&error, CheckpointError::Dtype { tensor, found } if tensor == name && found == "I32"), "{error}");
    assert!(original.len() > 50);
    let error = with_key("granitemoe", "num_local_experts", Some(json!(9)));
    assert!(matches!(error, CheckpointError::Shape { .. }), "{error}");
    let error = with_key("granitemoe", "tie_word_embeddings", Some(json!(false)));
    assert!(matches!(&error, CheckpointError::MissingTensor { tensor } if tensor == "lm_head.weight"), "{error}");
}

#[test]
fn an_expert_that_the_model_does_not_have_is_refused() {
    let checkpoint = Checkpoint::open(&fixture("qwen3_moe")).unwrap();
    for (layer, expert) in [(0, 8), (1, 0), (4, 0), (usize::MAX, usize::MAX)] {
        let error = Expert::load(&checkpoint, layer, expert).unwrap_err();
        assert!(matches!(error, LoadError::NoSuchExpert { layer: l, expert: e } if (l, e) == (layer, expert)));
    }
}

fn family() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("qwen2_moe"), Just("deepseek_v3"), Just("glm4_moe"), Just("gpt_oss")]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn spoilt_bytes_in_a_header_or_config_never_panic(at in 0usize..4000, byte in any::<u8>(), config in any::<bool>()) {
        let dir = copy("granitemoe");
        let path = dir.path().join(if config { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        std::fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            checkpoint.sizes();
        }
    }

    #[test]
    fn any_number_in_any_key_never_panics(family in family(), key in 0usize..40, value in prop_oneof![
        any::<i64>().prop_map(|v| json!(v)), any::<f64>().prop_map(|v| json!(v)), (0u64..70).prop_map(|v| json!(v)),
        Just(json!(null)), Just(json!({"type": "yarn", "factor": 1e-300})), Just(json!([1, 2])), Just(json!("x")),
    ]) {
        let dir = copy(family);
        edit_json(&dir.path().join("config.json"), |config| {
            let map = config.as_object_mut().unwrap();
            let name = map.keys().nth(key % map.len()).unwrap().clone();
            map.insert(name, value);
        });
        if Checkpoint::open(dir.path()).is_ok() {
            let mut model = Local::open(dir.path());
            let max = model.trunk.spec().max_positions;
            model.prefill(&[1, 2, 3][..max.min(3)]);
        }
    }
}
