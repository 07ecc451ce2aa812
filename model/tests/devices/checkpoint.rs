//! Models with experts in every dtype, with values of all sizes.

use half::{bf16, f16};
use hanse_model::{Checkpoint, StoredDtype, tensor_shapes};
use serde_json::{Value, json};

use crate::common::{fixture, json as read_json};

pub(crate) struct Noise(pub(crate) u32);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn byte(&mut self) -> u8 {
        self.next();
        (self.0 >> 21) as u8
    }

    /// Mostly ordinary, some tiny, some huge, some nothing.
    fn value(&mut self) -> f32 {
        let value = self.next();
        match self.0 >> 3 & 63 {
            0 => value * 1e-7,
            1 => value * 3e3,
            2 => 0.0,
            3 => -0.0,
            _ => value,
        }
    }

    pub(crate) fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }

    /// Blocks of noise, with scales of values of all sizes.
    fn blocks(&mut self, dtype: StoredDtype, values: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..dtype.bytes(values).unwrap()).map(|_| self.byte()).collect();
        for block in bytes.chunks_exact_mut(dtype.block().1) {
            // q4_k has two.
            let scales = if dtype == StoredDtype::Q4K { 2 } else { 1 };
            block[..2 * scales].as_chunks_mut().0.fill_with(|| f16::from_f32(self.value() * 0.02).to_le_bytes());
        }
        bytes
    }
}

/// Tells how a tensor of experts is stored by its name: `F32`, `F16`, `BF16`, `Q8_0`, `Q4_K`, `F8_E4M3`, or `F4` for MXFP4.
pub(crate) type DtypeOf = fn(&str) -> &'static str;

/// A model of two experts.
pub(crate) fn mixtral(hidden: usize, inner: usize) -> Value {
    json!({
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2, "vocab_size": 2,
        "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    })
}

/// A model whose experts have biases and another activation.
pub(crate) fn gpt_oss(hidden: usize, inner: usize) -> Value {
    let mut config = read_json(&fixture("gpt_oss").join("config.json"));
    config["hidden_size"] = json!(hidden);
    config["intermediate_size"] = json!(inner);
    config
}

/// A tensor as safetensors files have it.
struct Written {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Tensors that make up one of the model's.
fn stored(name: String, shape: Vec<usize>, dtype: &'static str, noise: &mut Noise) -> Vec<Written> {
    let values: usize = shape.iter().product();
    let tensor = |name, dtype, shape, bytes| Written { name, dtype, shape, bytes };
    let blocks = |dtype: StoredDtype, noise: &mut Noise| {
        let mut shape = shape.clone();
        let last = shape.last_mut().unwrap();
        *last = dtype.bytes(*last).unwrap();
        vec![tensor(format!("{name}{}", dtype.suffix().unwrap()), "U8", shape, noise.blocks(dtype, values))]
    };
    match (dtype, &shape[..]) {
        ("Q8_0", _) => blocks(StoredDtype::Q8_0, noise),
        ("Q4_K", _) => blocks(StoredDtype::Q4K, noise),
        ("F8_E4M3", &[outputs, inputs]) => {
            let codes = (0..values).map(|_| noise.byte()).map(|byte| if byte & 0x7f == 0x7f { 0x80 } else { byte });
            let (codes, tiles) = (codes.collect(), vec![outputs.div_ceil(128), inputs.div_ceil(128)]);
            // From nothing and subnormal ones to some by which a factor too many would make infinities.
            let scale = |at: usize, noise: &mut Noise| match at % 7 {
                2 => 0.0,
                3 => 3e-39,
                4 => 700.0,
                _ => noise.next().abs() * 0.01,
            };
            let scales = (0..tiles.iter().product()).flat_map(|at| scale(at, noise).to_le_bytes()).collect();
            let scales = tensor(format!("{name}_scale_inv"), "F32", tiles, scales);
            vec![tensor(name, dtype, shape, codes), scales]
        }
        // Inputs come first in other dtypes, outputs in this one.
        ("F4", &[experts, inputs, outputs]) => {
            let shape = vec![experts, outputs, inputs / 32];
            let codes = (0..values / 2).map(|_| noise.byte()).collect();
            let scale = |noise: &mut Noise| match noise.byte() {
                0..4 => 0,
                4 => 140,
                byte => 116 + byte % 8,
            };
            let scales = (0..values / 32).map(|_| scale(noise)).collect();
            let blocks = tensor(format!("{name}_blocks"), "U8", [&shape[..], &[16]].concat(), codes);
            vec![blocks, tensor(format!("{name}_scales"), "U8", shape, scales)]
        }
        _ => {
            let bytes = noise.values(values).into_iter().flat_map(|value| match dtype {
                "F32" => value.to_le_bytes().to_vec(),
                "F16" => f16::from_f32(value).to_le_bytes().to_vec(),
                _ => bf16::from_f32(value).to_le_bytes().to_vec(),
            });
            let bytes = bytes.collect();
            vec![tensor(name, dtype, shape, bytes)]
        }
    }
}

/// Writes the model of a config.
pub(crate) fn checkpoint(config: &Value, dtype: DtypeOf) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let config = config.to_string();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut noise = Noise(config.bytes().map(u32::from).fold(7, |seed, byte| seed.wrapping_mul(31) + byte));
    for (name, shape) in tensor_shapes(&config).unwrap() {
        let is_experts = name.contains("experts.") && !name.ends_with("bias");
        let dtype = if is_experts { dtype(&name) } else { "F32" };
        for Written { name, dtype, shape, bytes } in stored(name, shape, dtype, &mut noise) {
            let place = [data.len(), data.len() + bytes.len()];
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": place}));
            data.extend(bytes);
        }
    }
    let header = Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let opened = Checkpoint::open(dir.path()).unwrap();
    (dir, opened)
}
