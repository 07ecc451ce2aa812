//! Checkpoints in few bits compute what the same checkpoints in f32 do, bit for bit; those that are wrong are refused by name.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Local, bits, fixture};
use hanse_model::{
    Checkpoint, CheckpointError, ConfigError, Expert, FolderError, LoadError, Precision, StoredDtype, quantise_folder,
    tensor_shapes,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const PROMPT: [u32; 11] = [3, 17, 200, 4, 4, 90, 31, 77, 1, 0, 250];

#[derive(Clone)]
struct Tensor {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Tensors = BTreeMap<String, Tensor>;

fn f32_tensor(shape: Vec<usize>, values: &[f32]) -> Tensor {
    Tensor { dtype: "F32", shape, bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect() }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    assert_eq!(tensor.dtype, "F32");
    tensor.bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

fn folder(config: &Value, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write_tensors(dir.path(), tensors);
    dir
}

fn write_tensors(dir: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, Tensor { dtype, shape, bytes }) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// What a folder holds.
fn tensors(dir: &Path) -> Tensors {
    let mut found = Tensors::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = std::fs::read(path).unwrap();
            for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let dtype = match tensor.dtype() {
                    safetensors::Dtype::F32 => "F32",
                    safetensors::Dtype::U8 => "U8",
                    safetensors::Dtype::BF16 => "BF16",
                    other => panic!("{other:?}"),
                };
                let tensor = Tensor { dtype, shape: tensor.shape().to_vec(), bytes: tensor.data().to_vec() };
                found.insert(name, tensor);
            }
        }
    }
    found
}

fn noise(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (((i + seed) * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.2).collect()
}

/// A model with random weights, in f32.
fn random(config: &Value) -> Tensors {
    let shapes = tensor_shapes(&config.to_string()).unwrap();
    let tensor = |(number, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = noise(number * 131, shape.iter().product());
        // Norms near one.
        let is_norm = shape.len() == 1 && name.ends_with("norm.weight");
        let values: Vec<f32> = values.iter().map(|value| if is_norm { 1.0 + value } else { *value }).collect();
        (name, f32_tensor(shape, &values))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn logits(dir: &Path) -> Vec<u32> {
    bits(&Local::open(dir).prefill(&PROMPT))
}

/// Logits of one token after another.
fn decoded(dir: &Path) -> Vec<Vec<u32>> {
    let mut model = Local::open(dir);
    let mut cache = model.trunk.new_cache();
    PROMPT.iter().map(|token| bits(&model.forward(&[*token], &mut cache, hanse_model::LogitsWanted::Last))).collect()
}

fn config(family: &str) -> Value {
    common::json(&fixture(family).join("config.json"))
}

fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size =
        if exponent == 0 { mantissa / 8.0 * 2f32.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
    if byte & 0x80 == 0 { size } else { -size }
}

const FP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// DeepSeek V3 as it is published: all matrices in fp8 with scales, save embeddings, head and routers; and the same in f32.
fn deepseek() -> (Value, Tensors, Tensors) {
    let mut config = config("deepseek_v3");
    // More than a block of 128 each way, and none whole.
    config["hidden_size"] = json!(160);
    config["moe_intermediate_size"] = json!(136);
    config["quantization_config"] = json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    });
    let (mut published, mut wide) = (random(&config), random(&config));
    let names: Vec<String> = wide.keys().cloned().collect();
    for (number, name) in names.into_iter().enumerate() {
        let tensor = wide[&name].clone();
        let [outputs, inputs] = tensor.shape[..] else { continue };
        if !name.ends_with("proj.weight") && !name.contains("_proj_with_mqa") {
            continue;
        }
        let broad = inputs.div_ceil(128);
        let codes: Vec<u8> = floats(&tensor).iter().map(|value| ((value + 0.2) * 600.0) as u8 & 0xbf).collect();
        let scales: Vec<f32> =
            (0..outputs.div_ceil(128) * broad).map(|i| 0.05 + (i + number) as f32 % 7.0 * 0.013).collect();
        let value = |at: usize| e4m3(codes[at]) * scales[at / inputs / 128 * broad + at % inputs / 128];
        let values: Vec<f32> = (0..outputs * inputs).map(value).collect();
        wide.insert(name.clone(), f32_tensor(tensor.shape.clone(), &values));
        published.insert(format!("{name}_scale_inv"), f32_tensor(vec![outputs.div_ceil(128), broad], &scales));
        published.insert(name, Tensor { dtype: "F8_E4M3", bytes: codes, ..tensor });
    }
    (config, published, wide)
}

/// gpt-oss as it is published: experts in MXFP4; and the same in f32.
fn gpt_oss() -> (Value, Tensors, Tensors) {
    let mut config = config("gpt_oss");
    config["hidden_size"] = json!(64);
    config["intermediate_size"] = json!(96);
    config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    let (mut published, mut wide) = (random(&config), random(&config));
    let names: Vec<String> =
        wide.keys().filter(|name| name.contains("experts.") && !name.ends_with("bias")).cloned().collect();
    assert_eq!(names.len(), 8);
    for name in names {
        // Inputs come first in f32, outputs in MXFP4.
        let [experts, inputs, outputs] = wide[&name].shape[..] else { panic!("{name}") };
        let (count, blocks) = (experts * outputs * inputs, inputs / 32);
        let bytes: Vec<u8> = (0..count / 2).map(|i| (i * 197 % 251) as u8).collect();
        let scales: Vec<u8> = (0..count / 32).map(|i| 121 + (i % 5) as u8).collect();
        let mut values = vec![0.0; count];
        for at in 0..count {
            let (expert, output, input) = (at / inputs / outputs, at / inputs % outputs, at % inputs);
            let code = if at % 2 == 0 { bytes[at / 2] & 15 } else { bytes[at / 2] >> 4 };
            let value = FP4[usize::from(code)] * 2f32.powi(i32::from(scales[at / 32]) - 127);
            values[(expert * inputs + input) * outputs + output] = value;
        }
        wide.insert(name.clone(), f32_tensor(vec![experts, inputs, outputs], &values));
        published.remove(&name);
        let tensor = |shape, bytes| Tensor { dtype: "U8", shape, bytes };
        published.insert(format!("{name}_blocks"), tensor(vec![experts, outputs, blocks, 16], bytes));
        published.insert(format!("{name}_scales"), tensor(vec![experts, outputs, blocks], scales));
    }
    (config, published, wide)
}

#[test]
fn models_as_they_are_published_give_the_bits_of_their_weights_in_f32() {
    for (config, published, wide) in [deepseek(), gpt_oss()] {
        let (published, wide) = (folder(&config, &published), folder(&config, &wide));
        let family = &config["model_type"];
        assert_eq!(logits(published.path()), logits(wide.path()), "{family}");
        assert_eq!(decoded(published.path()), decoded(wide.path()), "{family}");
        let (small, large) = (Checkpoint::open(published.path()).unwrap(), Checkpoint::open(wide.path()).unwrap());
        let layer = small.spec().layers.len() - 1;
        let bytes = |checkpoint: &Checkpoint| Expert::load(checkpoint, layer, 1).unwrap().bytes();
        assert!(bytes(&small) * 3 < bytes(&large), "{family}");
        for checkpoint in [&small, &large] {
            assert_eq!(bytes(checkpoint), checkpoint.sizes().bytes_per_expert[layer], "{family}");
        }
    }
}

fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// A tensor's values: of q8_0 and q4_k as `dequantize_row_*` of `ggml-quants.c` have them.
fn widened(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let (name, values, block, bytes): (_, Vec<f32>, _, _) = if let Some(name) = name.strip_suffix(".q8_0") {
        let of = |block: &[u8]| block[2..].iter().map(|byte| f32::from(*byte as i8) * f16(block)).collect::<Vec<_>>();
        (name, tensor.bytes.chunks(34).flat_map(of).collect(), 32, 34)
    } else if let Some(name) = name.strip_suffix(".q4_k") {
        let of = |block: &[u8]| {
            let q = &block[4..16];
            let scale = |j: usize| if j < 4 { q[j] & 63 } else { (q[j + 4] & 15) | (q[j - 4] >> 6 << 4) };
            let minimum = |j: usize| if j < 4 { q[j + 4] & 63 } else { (q[j + 4] >> 4) | (q[j] >> 6 << 4) };
            let code = |at: usize| block[16 + at / 64 * 32 + at % 32] >> (at % 64 / 32 * 4) & 15;
            let value = |at: usize| {
                let (scale, minimum) =
                    (f16(block) * f32::from(scale(at / 32)), f16(&block[2..]) * f32::from(minimum(at / 32)));
                scale * f32::from(code(at)) - minimum
            };
            (0..256).map(value).collect::<Vec<_>>()
        };
        (name, tensor.bytes.chunks(144).flat_map(of).collect(), 256, 144)
    } else {
        return (name.to_owned(), tensor.clone());
    };
    let mut shape = tensor.shape.clone();
    let last = shape.last_mut().unwrap();
    *last = *last / bytes * block;
    (name.to_owned(), f32_tensor(shape, &values))
}

/// Families with experts one by one and all together, with rows of whole blocks.
fn configs() -> Vec<Value> {
    ["mixtral", "granitemoe", "deepseek_v3"]
        .map(|family| {
            let mut config = config(family);
            config["hidden_size"] = json!(256);
            let width = if family == "deepseek_v3" { "moe_intermediate_size" } else { "intermediate_size" };
            config[width] = json!(if family == "granitemoe" { 288 } else { 512 });
            config
        })
        .into()
}

/// The id of the model that is quantised, as far as these tests care.
const ORIGINAL: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

#[test]
fn a_quantised_folder_gives_the_bits_of_its_weights_in_f32() {
    for config in configs() {
        let source = folder(&config, &random(&config));
        for (experts, trunk) in [
            (StoredDtype::Q8_0, None),
            (StoredDtype::Q4K, Some(StoredDtype::Q8_0)),
            (StoredDtype::Bf16, Some(StoredDtype::Bf16)),
        ] {
            let out = tempfile::tempdir().unwrap();
            let checkpoint = Checkpoint::open(source.path()).unwrap();
            let mut last = (0, 0);
            let precision = Precision { experts, trunk };
            let written =
                quantise_folder(&checkpoint, precision, ORIGINAL, &[], out.path(), &mut |done, all| last = (done, all))
                    .unwrap();
            assert_eq!((last.0, last.1, written.kept), (written.bytes, written.bytes, 0));
            let granite = config["model_type"] == "granitemoe";
            assert_eq!(written.fell_back > 0, granite && experts == StoredDtype::Q4K, "288 is no multiple of 256");
            let found = tensors(out.path());
            assert!(found.keys().any(|name| experts.suffix().is_none_or(|suffix| name.ends_with(suffix))));
            let says = common::json(&out.path().join("config.json"));
            assert_eq!(says["quantization_config"]["quant_method"], "hanse");
            assert_eq!(Checkpoint::open(out.path()).unwrap().original().as_deref(), Some(ORIGINAL));
            if experts == StoredDtype::Bf16 {
                logits(out.path());
                continue;
            }
            let wide = folder(&says, &found.iter().map(|(name, tensor)| widened(name, tensor)).collect());
            assert_eq!(logits(out.path()), logits(wide.path()), "{experts:?} {trunk:?} {}", config["model_type"]);
            assert_eq!(decoded(out.path()), decoded(wide.path()));
            // The whole is what the shares say.
            let sizes = Checkpoint::open(out.path()).unwrap().sizes();
            assert_eq!(sizes.trunk_bytes + sizes.expert_bytes, written.bytes);
            // And it can be quantised again.
            let again = tempfile::tempdir().unwrap();
            let checkpoint = Checkpoint::open(out.path()).unwrap();
            let precision = Precision { experts: StoredDtype::F16, trunk: None };
            quantise_folder(&checkpoint, precision, ORIGINAL, &[], again.path(), &mut |_, _| {}).unwrap();
            logits(again.path());
        }
    }
}

#[test]
fn an_interrupted_call_is_continued_and_nothing_else_is_overwritten() {
    let config = &configs()[0];
    let source = folder(config, &random(config));
    std::fs::write(source.path().join("tokenizer.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let precision = Precision { experts: StoredDtype::Q8_0, trunk: None };
    let quantise = |to: &Path, precision, stop: f64| {
        let mut progress = |done: u64, all: u64| assert!(done as f64 <= stop * all as f64, "stopped");
        let call =
            || quantise_folder(&checkpoint, precision, ORIGINAL, &["tokenizer.json", "other.json"], to, &mut progress);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(call))
    };
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    quantise(whole.path(), precision, 1.0).unwrap().unwrap();
    quantise(parts.path(), precision, 0.7).unwrap_err();
    assert!(!parts.path().join("config.json").exists(), "half a model is none");
    let other = Precision { experts: StoredDtype::F16, ..precision };
    let error = quantise(parts.path(), other, 1.0).unwrap().unwrap_err();
    assert!(matches!(error, FolderError::Occupied { .. }), "{error}");
    let written = quantise(parts.path(), precision, 1.0).unwrap().unwrap();
    assert!(written.kept > 0 && written.kept < written.shards, "{written:?}");
    let content = |dir: &Path| {
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .iter()
            .map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(path).unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(content(whole.path()), content(parts.path()));
    assert!(whole.path().join("tokenizer.json").exists());
    let error = quantise(whole.path(), precision, 1.0).unwrap().unwrap_err();
    assert!(matches!(error, FolderError::Occupied { .. }), "{error}");
}

#[test]
fn what_cannot_be_quantised_is_refused_by_name() {
    let (config, published, _) = gpt_oss();
    let source = folder(&config, &published);
    let quantise = |source: &Path, experts| {
        let out = tempfile::tempdir().unwrap();
        let precision = Precision { experts, trunk: None };
        quantise_folder(&Checkpoint::open(source).unwrap(), precision, ORIGINAL, &[], out.path(), &mut |_, _| {})
            .unwrap_err()
    };
    let error = quantise(source.path(), StoredDtype::Q8_0);
    assert!(matches!(error, FolderError::Family { family: "gpt_oss" }), "{error}");
    // Rows of 28 values.
    let FolderError::Tensor { tensor, .. } = quantise(&fixture("mixtral"), StoredDtype::Q4K) else { panic!() };
    assert_eq!(tensor, "model.layers.0.block_sparse_moe.experts.0.w2.weight");
    let config = &configs()[0];
    let mut spoilt = random(config);
    let name = "model.layers.1.block_sparse_moe.experts.3.w3.weight";
    spoilt.get_mut(name).unwrap().bytes[40..44].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = quantise(folder(config, &spoilt).path(), StoredDtype::Q8_0);
    let FolderError::Tensor { tensor, .. } = &error else { panic!("{error}") };
    assert_eq!(*tensor, format!("{name}.q8_0"));
}

#[test]
fn other_ways_to_quantise_are_refused_by_name() {
    let (mut config, published, _) = deepseek();
    let mut refused = |quantization: Value| {
        config["quantization_config"] = quantization;
        match Checkpoint::open(folder(&config, &published).path()).unwrap_err() {
            CheckpointError::Config(ConfigError::Invalid { key, value, .. }) => (key, value),
            error => panic!("{error}"),
        }
    };
    let key = "quantization_config.quant_method".to_owned();
    for method in ["awq", "gptq", "bitsandbytes", "compressed-tensors"] {
        assert_eq!(refused(json!({ "quant_method": method })), (key.clone(), format!("{method:?}")));
    }
    assert_eq!(refused(json!({ "bits": 4 })), (key, "absent".to_owned()));
    let key = "quantization_config.weight_block_size".to_owned();
    assert_eq!(
        refused(json!({"quant_method": "fp8", "weight_block_size": [64, 128]})),
        (key.clone(), "[64,128]".into())
    );
    assert_eq!(refused(json!({"quant_method": "fp8"})), (key, "absent".into()));
    let e5m2 = json!({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"});
    assert_eq!(refused(e5m2).0, "quantization_config.fmt");
}

/// Why a spoilt folder cannot be opened, or its experts and trunk not loaded.
fn error_of(config: &Value, tensors: &Tensors) -> CheckpointError {
    let dir = folder(config, tensors);
    let checkpoint = match Checkpoint::open(dir.path()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return error,
    };
    let pool = std::sync::Arc::new(hanse_model::compute_pool(1).unwrap());
    let experts = hanse_model::LocalExperts::load(&checkpoint, pool.clone()).err();
    match experts.or_else(|| hanse_model::Trunk::load(&checkpoint, pool).err()) {
        Some(LoadError::Checkpoint(error)) => error,
        Some(error) => panic!("{error}"),
        None => panic!("the folder is spoilt"),
    }
}

#[test]
fn spoilt_tensors_of_fp8_and_mxfp4_are_named() {
    let (config, published, _) = deepseek();
    for matrix in ["model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"] {
        let scales = format!("{matrix}_scale_inv");
        let spoil = |spoil: &dyn Fn(&mut Tensors)| {
            let mut tensors = published.clone();
            spoil(&mut tensors);
            error_of(&config, &tensors)
        };
        let error = spoil(&|tensors| drop(tensors.remove(&scales)));
        assert!(matches!(&error, CheckpointError::MissingTensor { tensor } if *tensor == scales), "{error}");
        let error = spoil(&|tensors| {
            let tensor = tensors.get_mut(&scales).unwrap();
            (tensor.shape, tensor.bytes) = (vec![1, 1], tensor.bytes[..4].to_vec());
        });
        assert!(matches!(&error, CheckpointError::Shape { tensor, .. } if *tensor == scales), "{error}");
        for value in [f32::NAN, f32::INFINITY, -1.0, 1e37] {
            let error = spoil(&|tensors| {
                tensors.get_mut(&scales).unwrap().bytes[4..8].copy_from_slice(&value.to_le_bytes());
            });
            let CheckpointError::Scale { part, at: 1, .. } = &error else { panic!("{error}") };
            assert!(part.contains(&scales), "{error}");
        }
        let error = spoil(&|tensors| {
            let tensor = tensors.get_mut(&scales).unwrap();
            (tensor.dtype, tensor.bytes) = ("BF16", tensor.bytes[..tensor.bytes.len() / 2].to_vec());
        });
        let CheckpointError::Dtype { tensor, .. } = &error else { panic!("{error}") };
        assert!(tensor.contains(&scales), "{error}");
    }
    let (config, published, _) = gpt_oss();
    let (blocks, scales) =
        ("model.layers.2.mlp.experts.gate_up_proj_blocks", "model.layers.2.mlp.experts.gate_up_proj_scales");
    let spoil = |name: &str, spoil: &dyn Fn(&mut Tensor)| {
        let mut tensors = published.clone();
        spoil(tensors.get_mut(name).unwrap());
        error_of(&config, &tensors)
    };
    for byte in [253, 255] {
        let error = spoil(scales, &|tensor| tensor.bytes[500] = byte);
        let CheckpointError::NotFinite { part, .. } = &error else { panic!("{error}") };
        assert!(part.contains(scales), "{error}");
    }
    for name in [blocks, scales] {
        let error = spoil(name, &|tensor| {
            tensor.shape[2] /= 2;
            tensor.bytes.truncate(tensor.bytes.len() / 2);
        });
        assert!(matches!(&error, CheckpointError::Shape { tensor, .. } if tensor == name), "{error}");
        let mut tensors = published.clone();
        tensors.remove(name);
        let error = error_of(&config, &tensors);
        // Without blocks it is taken for a folder in f32.
        let missing = if name == blocks { blocks.strip_suffix("_blocks").unwrap() } else { scales };
        assert!(matches!(&error, CheckpointError::MissingTensor { tensor } if tensor == missing), "{error}");
    }
}

#[test]
fn wrong_numbers_of_blocks_are_named() {
    let config = &configs()[0];
    let source = folder(config, &random(config));
    let out = tempfile::tempdir().unwrap();
    let precision = Precision { experts: StoredDtype::Q8_0, trunk: None };
    quantise_folder(&Checkpoint::open(source.path()).unwrap(), precision, ORIGINAL, &[], out.path(), &mut |_, _| {})
        .unwrap();
    let (config, quantised) = (common::json(&out.path().join("config.json")), tensors(out.path()));
    let name = "model.layers.1.block_sparse_moe.experts.3.w3.weight";
    let written = format!("{name}.q8_0");
    let with_rows = |row: usize| {
        let mut tensors = quantised.clone();
        let tensor = tensors.get_mut(&written).unwrap();
        tensor.shape[1] = row;
        tensor.bytes.resize(tensor.shape[0] * row, 0);
        error_of(&config, &tensors)
    };
    let error = with_rows(8 * 34 - 1);
    assert!(
        matches!(&error, CheckpointError::Blocks { tensor, row_bytes: 271, block_bytes: 34 } if *tensor == written),
        "{error}"
    );
    let error = with_rows(9 * 34);
    let CheckpointError::Shape { tensor, expected, found } = &error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), &expected[..], &found[..]), (name, &[512, 256][..], &[512, 288][..]));
    let mut twice = quantised.clone();
    twice.insert(name.to_owned(), f32_tensor(vec![512, 256], &noise(1, 512 * 256)));
    let error = error_of(&config, &twice);
    assert!(matches!(&error, CheckpointError::Duplicate { tensor, .. } if tensor == name), "{error}");
    let mut mixed = quantised.clone();
    let tensor = mixed.remove(&written).unwrap();
    mixed.insert(name.to_owned(), widened(&written, &tensor).1);
    let dir = folder(&config, &mixed);
    let error = Checkpoint::open(dir.path()).unwrap().weight_map().unwrap_err();
    assert!(matches!(error, CheckpointError::MixedDtypes { layer: 1 }), "{error}");
}
