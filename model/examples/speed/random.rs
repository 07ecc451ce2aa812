//! A random checkpoint of one layer with experts of 2048 x 768, for measuring.

/// Values of a row.
pub(crate) const HIDDEN: usize = 2048;
/// Values between.
pub(crate) const WIDTH: usize = 768;
/// Experts of the one layer.
pub(crate) const EXPERTS: usize = 24;

/// Writes one, in a dtype of so many bytes.
pub(crate) fn checkpoint(dtype: &str, value_bytes: u8) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = serde_json::json!({
        "model_type": "olmoe", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 16, "num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": 2,
        "tie_word_embeddings": true, "max_position_embeddings": 8,
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
        end += shape.iter().product::<usize>() * usize::from(value_bytes);
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
