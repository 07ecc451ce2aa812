//! How fast experts run on this machine: `cargo run --release -p hanse-model --example expert_speed`.
//!
//! Writes a random checkpoint with experts of 2048 x 768 to a temporary folder and goes through them in turn, so that
//! weights come from memory and not from a cache. GB/s counts weights; GFLOP/s counts two per multiplication.

use std::time::Instant;

use hanse_model::{Checkpoint, Expert, ExpertJob, compute_pool, run_experts};

const HIDDEN: usize = 2048;
const WIDTH: usize = 768;
const EXPERTS: usize = 24;

fn checkpoint(dtype: &str, value_bytes: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = serde_json::json!({
        "model_type": "olmoe", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 16, "num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": 2,
        "tie_word_embeddings": true,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![2, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
        ("model.layers.0.mlp.gate.weight".into(), vec![EXPERTS, HIDDEN]),
        ("model.layers.0.mlp.experts.gate_up_proj".into(), vec![EXPERTS, 2 * WIDTH, HIDDEN]),
        ("model.layers.0.mlp.experts.down_proj".into(), vec![EXPERTS, HIDDEN, WIDTH]),
    ];
    for name in ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"] {
        tensors.push((format!("model.layers.0.{name}.weight"), vec![HIDDEN]));
    }
    for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        tensors.push((format!("model.layers.0.self_attn.{name}.weight"), vec![HIDDEN, HIDDEN]));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * value_bytes;
        header.insert(name, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::Value::from(header).to_string();
    header.push_str(&" ".repeat((8 - header.len() % 8) % 8));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    // Values near 0.01 in every dtype; what they are does not matter for the time.
    let value: &[u8] = match dtype {
        "F32" => &[0x0a, 0xd7, 0x23, 0x3c],
        "F16" => &[0x1f, 0x21],
        _ => &[0x24, 0x3c],
    };
    file.extend(value.iter().cycle().take(end));
    std::fs::write(dir.path().join("model.safetensors"), file).expect("written");
    dir
}

fn main() {
    println!("dtype threads rows    best ms  median ms   GB/s  GFLOP/s (of the best)");
    for (dtype, value_bytes) in [("F32", 4), ("F16", 2), ("BF16", 2)] {
        let dir = checkpoint(dtype, value_bytes);
        let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
        let experts: Vec<Expert> = (0..EXPERTS).map(|e| Expert::load(&checkpoint, 0, e).expect("an expert")).collect();
        for threads in [1, 2] {
            let pool = compute_pool(threads).expect("a pool");
            for rows in [1, 4, 16, 64] {
                let hidden = vec![0.5; rows * HIDDEN];
                let mut output = vec![0.0; rows * HIDDEN];
                let mut times: Vec<f64> = experts
                    .iter()
                    .cycle()
                    .take(5 * EXPERTS)
                    .map(|expert| {
                        let start = Instant::now();
                        run_experts(&mut [ExpertJob { expert, hidden: &hidden, output: &mut output }], &pool);
                        start.elapsed().as_secs_f64()
                    })
                    .collect();
                times.sort_by(f64::total_cmp);
                let (best, median) = (times[0], times[times.len() / 2]);
                let weights = (3 * HIDDEN * WIDTH) as f64;
                println!(
                    "{dtype:5} {threads:7} {rows:4} {:10.3} {:10.3} {:6.1} {:8.1}",
                    best * 1e3,
                    median * 1e3,
                    weights * value_bytes as f64 / best / 1e9,
                    2.0 * weights * rows as f64 / best / 1e9,
                );
            }
        }
    }
}
