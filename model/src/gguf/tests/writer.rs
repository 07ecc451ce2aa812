//! GGUF files that tests make.

use crate::gguf::blocks::BlockType;

/// A GGUF file in the making.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) keys: Vec<(String, Vec<u8>)>,
    pub(super) tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// The fastest first.
    pub(super) shape: Vec<u64>,
    pub(super) kind: u32,
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
}

pub(super) fn number(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(super) fn float(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(super) fn text(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &string(text)].concat()
}

pub(super) fn list(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), elements].concat()
}

pub(super) fn texts(texts: &[&str]) -> Vec<u8> {
    list(8, texts.len() as u64, &texts.iter().flat_map(|text| string(text)).collect::<Vec<_>>())
}

fn different<const N: usize>(block: u64) -> [u8; N] {
    std::array::from_fn(|at| (block * 29 + at as u64 * 7) as u8)
}

impl Writer {
    /// A model of one layer with 32 values of a hidden state, with a vocabulary of four tokens and five embeddings.
    pub(super) fn of(architecture: &str, keys: &[(&str, u32)], layer: &[(&str, u32, Vec<u64>)]) -> Self {
        let mut this = Self { keys: Vec::new(), tensors: Vec::new() };
        this.set("general.architecture", text(architecture));
        for (key, value) in [("block_count", 1), ("context_length", 64), ("embedding_length", 32)].iter().chain(keys) {
            this.set(&format!("{architecture}.{key}"), number(*value));
        }
        this.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), float(1e-6));
        this.set("tokenizer.ggml.model", text("gpt2"));
        this.set("tokenizer.ggml.pre", text("qwen2"));
        this.set("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<end>"]));
        this.set("tokenizer.ggml.token_type", list(5, 4, &[1, 1, 1, 3].map(i32::to_le_bytes).concat()));
        this.set("tokenizer.ggml.merges", texts(&["a b"]));
        this.set("tokenizer.ggml.eos_token_id", number(3));
        this.tensor("token_embd.weight", &[32, 5]);
        this.tensor("output_norm.weight", &[32]);
        for (name, kind, shape) in layer {
            this.stored(&format!("blk.0.{name}"), *kind, shape);
        }
        this
    }

    /// A sound `qwen2` model of one layer, with a vocabulary of four tokens.
    pub(super) fn sound() -> Self {
        let keys = [("feed_forward_length", 32), ("attention.head_count", 4), ("attention.head_count_kv", 2)];
        let layer = [
            ("attn_norm.weight", vec![32]),
            ("ffn_norm.weight", vec![32]),
            ("attn_q.weight", vec![32, 32]),
            ("attn_q.bias", vec![32]),
            ("attn_k.weight", vec![32, 16]),
            ("attn_k.bias", vec![16]),
            ("attn_v.weight", vec![32, 16]),
            ("attn_v.bias", vec![16]),
            ("attn_output.weight", vec![32, 32]),
            ("ffn_gate.weight", vec![32, 32]),
            ("ffn_up.weight", vec![32, 32]),
            ("ffn_down.weight", vec![32, 32]),
        ];
        Self::of("qwen2", &keys, &layer.map(|(name, shape)| (name, 0, shape)))
    }

    pub(super) fn set(&mut self, key: &str, value: Vec<u8>) {
        self.keys.retain(|(found, _)| found != key);
        self.keys.push((key.to_owned(), value));
    }

    /// Adds a tensor of different values in f32.
    pub(super) fn tensor(&mut self, name: &str, shape: &[u64]) {
        self.stored(name, 0, shape);
    }

    /// Adds one in f32 (0), Q8_0 (8) or MXFP4 (39).
    pub(super) fn stored(&mut self, name: &str, kind: u32, shape: &[u64]) {
        let offset = self.tensors.last().map_or(0, |last| last.offset + (last.data.len() as u64).next_multiple_of(32));
        let values = shape.iter().product::<u64>();
        let data = match kind {
            0 => (0..values).flat_map(|value| (value as f32 / values as f32 - 0.5).to_le_bytes()).collect(),
            // Scales of 1 / 128 and of 1 / 8.
            8 => (0..values / 32).flat_map(|block| [&[0, 0x20][..], &different::<32>(block)].concat()).collect(),
            39 => (0..values / 32).flat_map(|block| [&[124][..], &different::<16>(block)].concat()).collect(),
            other => panic!("blocks of type {other} are not made here"),
        };
        self.tensors.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), kind, offset, data });
    }

    pub(super) fn named(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.tensors.retain(|tensor| tensor.name != name);
    }

    /// What a tensor stands for.
    pub(super) fn values(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        BlockType::of(tensor.kind).unwrap().widen(&tensor.data).unwrap()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(string(key));
            out.extend(value);
        }
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        let start = out.len();
        for tensor in &self.tensors {
            let at = start + tensor.offset.min(1 << 20) as usize;
            out.resize(out.len().max(at + tensor.data.len()), 0);
            out[at..at + tensor.data.len()].copy_from_slice(&tensor.data);
        }
        out
    }
}
