//! How fast experts run on this machine in each dtype that weights may be stored in, in one thread:
//! `cargo run --release -p hanse-model --example precision_speed`.
//!
//! Writes a random checkpoint for each with experts of 2048 x 768 to temporary folders and goes through their experts in turn, so that
//! weights come from memory and not from a cache. The dtypes take turns, and each time is the best of some.

use std::time::Instant;

use hanse_model::peak::read_through;
use hanse_model::{Checkpoint, Expert, ExpertJob, compute_pool, run_experts, tensor_shapes};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 2048;
const WIDTH: usize = 768;
const EXPERTS: usize = 24;
const ROWS: [usize; 6] = [1, 2, 4, 16, 64, 256];

/// A way to store an expert's matrix, and bytes that are all usable numbers in it.
struct Stored {
    name: &'static str,
    /// For gpt-oss and not another family.
    is_mxfp4: bool,
    dtype: &'static str,
    suffix: &'static str,
    /// Bytes of a block, and its values.
    block: (usize, usize),
    bytes: &'static [u8],
}

const PLAIN: Stored =
    Stored { name: "f32", is_mxfp4: false, dtype: "F32", suffix: "", block: (4, 1), bytes: &[0x0a, 0xd7, 0x23, 0x3c] };
const STORED: [Stored; 7] = [
    PLAIN,
    Stored { name: "f16", dtype: "F16", block: (2, 1), bytes: &[0x1f, 0x21], ..PLAIN },
    Stored { name: "bf16", dtype: "BF16", block: (2, 1), bytes: &[0x24, 0x3c], ..PLAIN },
    Stored { name: "q8_0", dtype: "U8", suffix: ".q8_0", block: (34, 32), bytes: &[0x21], ..PLAIN },
    Stored { name: "q4_k", dtype: "U8", suffix: ".q4_k", block: (144, 256), bytes: &[0x21], ..PLAIN },
    Stored { name: "fp8", dtype: "F8_E4M3", block: (1, 1), bytes: &[0x21], ..PLAIN },
    Stored { name: "mxfp4", is_mxfp4: true, dtype: "U8", block: (1, 2), bytes: &[0x21], ..PLAIN },
];

impl Stored {
    /// Names, dtypes, shapes and bytes of what a tensor is written as.
    fn tensors(&self, name: String, mut shape: Vec<usize>) -> Vec<(String, &'static str, Vec<usize>, &'static [u8])> {
        let plain = |name, shape| (name, PLAIN.dtype, shape, PLAIN.bytes);
        if !name.contains(".mlp.experts.") || name.ends_with("_bias") {
            return vec![plain(name, shape)];
        }
        if self.is_mxfp4 {
            // Inputs come first in what `tensor_shapes` says.
            let scales = vec![shape[0], shape[2], shape[1] / 32];
            let blocks = [&scales[..], &[16]].concat();
            let scale: &[u8] = &[120];
            return vec![
                (format!("{name}_blocks"), self.dtype, blocks, self.bytes),
                (format!("{name}_scales"), self.dtype, scales, scale),
            ];
        }
        let scales = (self.name == "fp8")
            .then(|| plain(format!("{name}_scale_inv"), shape.iter().map(|size| size.div_ceil(128)).collect()));
        if !self.suffix.is_empty()
            && let Some(row) = shape.last_mut()
        {
            *row = *row / self.block.1 * self.block.0;
        }
        let own = (format!("{name}{}", self.suffix), self.dtype, shape, self.bytes);
        [Some(own), scales].into_iter().flatten().collect()
    }

    fn checkpoint(&self) -> tempfile::TempDir {
        let yarn = json!({"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096});
        let config = json!({
            "rope_scaling": if self.is_mxfp4 { yarn } else { Value::Null },
            "model_type": if self.is_mxfp4 { "gpt_oss" } else { "olmoe" }, "hidden_size": HIDDEN,
            "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": 2,
            "head_dim": 128, "tie_word_embeddings": true, "max_position_embeddings": 8,
        });
        let dir = tempfile::tempdir().expect("a temporary folder");
        let shapes = tensor_shapes(&config.to_string()).expect("a config");
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, shape) in shapes {
            for (name, dtype, shape, bytes) in self.tensors(name, shape) {
                let size = match dtype {
                    "F32" => 4,
                    "F16" | "BF16" => 2,
                    _ => 1,
                };
                let start = data.len();
                data.extend(bytes.iter().cycle().take(shape.iter().product::<usize>() * size));
                let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
                header.insert(name, info);
            }
        }
        let mut header = Value::from(header).to_string();
        header.push_str(&" ".repeat((8 - header.len() % 8) % 8));
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        std::fs::write(dir.path().join("model.safetensors"), file).expect("written");
        std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
        dir
    }
}

fn timed(run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    started.elapsed().as_secs_f64()
}

fn main() {
    let dirs: Vec<_> = STORED.iter().map(Stored::checkpoint).collect();
    let load = |dir: &tempfile::TempDir| -> Vec<Expert> {
        let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
        (0..EXPERTS).map(|expert| Expert::load(&checkpoint, 0, expert).expect("an expert")).collect()
    };
    let experts: Vec<Vec<Expert>> = dirs.iter().map(load).collect();
    let pool = compute_pool(1).expect("a pool");
    let memory = vec![1.0f32; 64 << 20];
    let mut reading = f64::MAX;
    for part in memory.chunks(4 << 20) {
        let read = || {
            std::hint::black_box(read_through(part));
        };
        reading = reading.min(timed(read) / (part.len() * 4) as f64);
    }
    println!("reading memory: {:.1} GB/s", 1e-9 / reading);
    println!("dtype  bytes/expert  rows  time/row (us)  rows/s   GB/s  GFLOP/s  of f32");
    for rows in ROWS {
        let hidden = vec![0.5; rows * HIDDEN];
        let mut output = vec![0.0; rows * HIDDEN];
        let mut best = [f64::MAX; STORED.len()];
        for number in 0..2 * EXPERTS {
            for (best, experts) in best.iter_mut().zip(&experts) {
                let expert = &experts[number % EXPERTS];
                let run = || run_experts(&mut [ExpertJob { expert, hidden: &hidden, output: &mut output }], &pool);
                *best = best.min(timed(run));
            }
        }
        for ((stored, experts), seconds) in STORED.iter().zip(&experts).zip(best) {
            let weights = (3 * HIDDEN * WIDTH) as f64;
            println!(
                "{:5} {:13} {rows:5} {:14.1} {:7.0} {:6.1} {:8.1} {:7.2}",
                stored.name,
                experts[0].bytes(),
                seconds / rows as f64 * 1e6,
                rows as f64 / seconds,
                experts[0].bytes() as f64 / seconds / 1e9,
                2.0 * weights * rows as f64 / seconds / 1e9,
                best[0] / seconds,
            );
        }
    }
}
