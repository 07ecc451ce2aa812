//! Checkpoints in few bits compute what the same checkpoints in f32 do, bit for bit; those that are wrong are refused by name.

#[path = "../common/mod.rs"]
mod common;
mod folders;
mod refused;

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
