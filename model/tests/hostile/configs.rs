//! `config.json` that is wrong: the error names key and value.

use super::*;

#[test]
fn an_unknown_family_is_refused_naming_the_known_ones() {
    let error = with_key("mixtral", "model_type", Some(json!("mamba")));
    let CheckpointError::Config(ConfigError::UnknownFamily { found, known }) = &error else { panic!("{error}") };
    assert_eq!((found.as_str(), known), ("mamba", &known_families()));
    for family in ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "kimi_k2", "gpt_oss", "llama"] {
        assert!(error.to_string().contains(family));
    }
}

#[test]
fn a_missing_key_is_named() {
    let cases = [
        ("mixtral", "model_type"),
        ("mixtral", "hidden_size"),
        ("mixtral", "vocab_size"),
        ("mixtral", "num_hidden_layers"),
        ("mixtral", "num_attention_heads"),
        ("olmoe", "intermediate_size"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("qwen2_moe", "moe_intermediate_size"),
        ("qwen3_moe", "intermediate_size"),
        ("granitemoe", "hidden_size"),
        ("mixtral", "num_local_experts"),
        ("granitemoe", "num_local_experts"),
        ("olmoe", "num_experts"),
        ("qwen2_moe", "num_experts"),
        ("qwen3_moe", "num_experts"),
        ("qwen3_moe", "num_experts_per_tok"),
        ("mixtral", "num_experts_per_tok"),
        ("granitemoe", "num_experts_per_tok"),
        ("olmoe", "max_position_embeddings"),
        ("mixtral", "max_position_embeddings"),
        ("deepseek_v2", "v_head_dim"),
        ("deepseek_v3", "intermediate_size"),
        ("deepseek_v3", "kv_lora_rank"),
        ("extra/deepseek_v32", "index_head_dim"),
        ("extra/deepseek_v32", "index_topk"),
        ("extra/deepseek_v32", "q_lora_rank"),
        ("deepseek_v3", "n_routed_experts"),
        ("deepseek_v3", "qk_nope_head_dim"),
        ("deepseek_v3", "qk_rope_head_dim"),
        ("glm4_moe", "n_routed_experts"),
        ("gpt_oss", "num_local_experts"),
        ("gpt_oss", "rope_scaling"),
        ("extra/ernie4_5_moe", "moe_k"),
        ("extra/ernie4_5_moe", "moe_num_experts"),
        ("extra/hunyuan_v1_moe", "moe_topk"),
        ("extra/hunyuan_v1_moe", "num_experts"),
        ("extra/llama_smollm", "intermediate_size"),
        ("extra/qwen3_window", "head_dim"),
    ];
    for (family, key) in cases {
        let error = with_key(family, key, None);
        assert!(
            matches!(&error, CheckpointError::Config(ConfigError::Missing { key: found, .. }) if found == key),
            "{error}"
        );
    }
    let error = with_key("olmoe", "num_experts", Some(Value::Null)).to_string();
    assert!(error.contains("`num_experts`") && error.contains("`num_local_experts`"), "{error}");
}

#[test]
fn a_nonsense_value_is_refused_naming_key_and_value() {
    let cases = [
        ("mixtral", "num_attention_heads", json!(0)),
        ("mixtral", "num_attention_heads", json!(3)),
        ("mixtral", "num_attention_heads", json!("four")),
        ("mixtral", "num_key_value_heads", json!(3)),
        ("mixtral", "num_key_value_heads", json!(0)),
        ("mixtral", "head_dim", json!(7)),
        ("mixtral", "hidden_size", json!(-32)),
        ("mixtral", "hidden_size", json!(1e12)),
        ("mixtral", "hidden_size", json!(32.5)),
        ("mixtral", "hidden_size", json!(1u64 << 63)),
        ("mixtral", "num_hidden_layers", json!(1_000_000_000_000u64)),
        ("mixtral", "vocab_size", json!(1_000_000_000_000u64)),
        ("mixtral", "num_local_experts", json!(0)),
        ("mixtral", "num_experts_per_tok", json!(9)),
        ("mixtral", "num_experts_per_tok", json!(0)),
        ("mixtral", "intermediate_size", json!(u64::MAX)),
        ("mixtral", "max_position_embeddings", json!(0)),
        ("mixtral", "rms_norm_eps", json!(-1e-5)),
        ("mixtral", "rms_norm_eps", json!("NaN")),
        ("mixtral", "rms_norm_eps", json!(1e300)),
        ("mixtral", "rope_theta", json!(-1.0)),
        ("mixtral", "rope_theta", json!(0)),
        ("mixtral", "sliding_window", json!(0)),
        ("mixtral", "hidden_act", json!("gelu")),
        ("mixtral", "tie_word_embeddings", json!("yes")),
        ("olmoe", "clip_qkv", json!(-1)),
        ("olmoe", "num_experts", json!(5000)),
        ("olmoe", "norm_topk_prob", json!(1)),
        ("qwen2_moe", "decoder_sparse_step", json!(0)),
        ("qwen2_moe", "mlp_only_layers", json!([-1])),
        ("qwen2_moe", "mlp_only_layers", json!(1)),
        ("qwen2_moe", "layer_types", json!(["full_attention"])),
        ("qwen2_moe", "layer_types", json!(["full_attention", "linear_attention", "full_attention"])),
        ("qwen2_moe", "layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
        ("qwen3_moe", "moe_intermediate_size", json!([])),
        ("granitemoe", "logits_scaling", json!(0)),
        ("granitemoe", "attention_multiplier", json!("0.2")),
        ("granitemoe", "position_embedding_type", json!("nope")),
        ("granitemoe", "rope_parameters", json!(5)),
        ("deepseek_v2", "mlp_bias", json!(true)),
        ("deepseek_v2", "norm_topk_prob", json!(true)),
        ("deepseek_v2", "scoring_func", json!("sigmoid")),
        ("deepseek_v2", "topk_method", json!("noaux_tc")),
        ("deepseek_v3", "first_k_dense_replace", json!(-1)),
        ("deepseek_v3", "head_dim", json!(12)),
        ("deepseek_v3", "mlp_layer_types", json!(["dense", "sparse"])),
        ("deepseek_v3", "mlp_layer_types", json!(["dense", "sparse", "dense"])),
        ("deepseek_v3", "mlp_layer_types", json!(["dense", "sparse", "thick"])),
        ("deepseek_v3", "moe_layer_freq", json!(0)),
        ("extra/deepseek_v32", "index_head_dim", json!(4)),
        ("extra/deepseek_v32", "index_n_heads", json!(0)),
        ("extra/deepseek_v32", "index_topk", json!(0)),
        ("extra/deepseek_v32", "index_topk", json!(-3)),
        ("deepseek_v3", "n_group", json!(3)),
        ("deepseek_v3", "n_group", json!(16)),
        ("deepseek_v3", "num_key_value_heads", json!(2)),
        ("deepseek_v3", "q_lora_rank", json!(0)),
        ("deepseek_v3", "qk_rope_head_dim", json!(7)),
        ("deepseek_v3", "routed_scaling_factor", json!(0)),
        ("deepseek_v3", "scoring_func", json!("softmax")),
        ("deepseek_v3", "topk_group", json!(5)),
        ("deepseek_v3", "topk_method", json!("greedy")),
        ("glm4_moe", "partial_rotary_factor", json!(0.01)),
        ("glm4_moe", "partial_rotary_factor", json!(2)),
        ("gpt_oss", "experts_per_token", json!(3)),
        ("gpt_oss", "layer_types", json!(["full_attention"])),
        ("gpt_oss", "layer_types", json!(["chunked_attention", "full_attention", "full_attention", "full_attention"])),
        ("gpt_oss", "sliding_window", json!(0)),
        ("gpt_oss", "swiglu_limit", json!(-7)),
        ("extra/ernie4_5_moe", "moe_layer_end_index", json!(-2)),
        ("extra/ernie4_5_moe", "use_bias", json!(true)),
        ("extra/hunyuan_v1_moe", "moe_topk", json!([2, 3, 2])),
        ("extra/hunyuan_v1_moe", "moe_intermediate_size", json!([20, 20, 20])),
        ("extra/hunyuan_v1_moe", "num_shared_expert", json!(2)),
        ("extra/hunyuan_v1_moe", "use_cla", json!(true)),
        ("extra/llama_smollm", "mlp_bias", json!(true)),
        ("extra/llama_smollm", "num_local_experts", json!(8)),
        ("extra/minimax_m2", "attn_type_list", json!([1, 0])),
        ("extra/minimax_m2", "qk_norm_type", json!("per_head")),
        ("extra/minimax_m2", "use_qk_norm", json!(false)),
        ("extra/qwen3_window", "layer_types", json!(["full_attention", "linear_attention", "full_attention"])),
    ];
    for (family, key, value) in cases {
        let error = with_key(family, key, Some(value.clone()));
        let CheckpointError::Config(ConfigError::Invalid { key: named, .. }) = &error else { panic!("{key}: {error}") };
        // Heads that do not fit are the hidden size's fault as much as their own.
        assert!(named == key || (key == "num_attention_heads" && named == "hidden_size"), "{key} = {value}: {error}");
        let shown = value.to_string();
        assert!(error.to_string().contains(&shown) || named != key, "{key} = {shown}: {error}");
    }
}

#[test]
fn numbers_of_heads_layers_and_positions_have_limits_of_their_own() {
    let cases = [
        ("extra/deepseek_v32", "index_n_heads", 1 << 14),
        // Positions.
        ("extra/deepseek_v32", "index_topk", 1 << 30),
        // The widest that a layer may be, in experts of 12.
        ("deepseek_v3", "n_shared_experts", (1 << 20) / 12),
        ("extra/ernie4_5_moe", "moe_num_shared_experts", (1 << 20) / 12),
        ("extra/dots1", "max_window_layers", 1024),
        ("extra/qwen3_window", "max_window_layers", 1024),
        ("qwen2_moe", "max_window_layers", 1024),
    ];
    for (family, key, most) in cases {
        let mut config = common::json(&fixture(family).join("config.json"));
        config[key] = json!(most);
        tensor_shapes(&config.to_string()).unwrap_or_else(|error| panic!("{family} {key}: {error}"));
        config[key] = json!(most + 1);
        let error = tensor_shapes(&config.to_string()).unwrap_err();
        let ConfigError::Invalid { key: named, .. } = &error else { panic!("{family} {key}: {error}") };
        assert_eq!(named, key);
        assert!(error.to_string().contains(&format!(" to {most}")), "{error}");
    }
}

#[test]
fn a_config_that_mixes_families_is_refused_naming_the_key_and_its_owners() {
    let cases = [
        ("mixtral", "kv_lora_rank", json!(16), "deepseek_v3"),
        ("mixtral", "n_routed_experts", json!(8), "glm4_moe"),
        ("mixtral", "mamba_d_state", json!(16), "not supported"),
        ("olmoe", "swiglu_limit", json!(7.0), "gpt_oss"),
        ("glm4_moe", "kv_lora_rank", json!(16), "kimi_k2"),
        ("deepseek_v3", "clip_qkv", json!(3), "olmoe"),
        ("qwen3_moe", "shared_expert_intermediate_size", json!(20), "qwen2_moe"),
        ("gpt_oss", "residual_multiplier", json!(0.2), "granitemoe"),
    ];
    for (family, key, value, owner) in cases {
        let error = with_key(family, key, Some(value)).to_string();
        assert!(error.contains(&format!("`{key}`")) && error.contains(family) && error.contains(owner), "{error}");
    }
    // What means that there is no such thing is in many configs.
    let dir = copy("mixtral");
    edit_json(&dir.path().join("config.json"), |config| {
        config["n_group"] = json!(1);
        config["kv_lora_rank"] = json!(null);
        config["mlp_only_layers"] = json!([]);
        config["shared_intermediate_size"] = json!(0);
    });
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn a_family_that_is_left_out_is_refused_saying_what_it_needs() {
    for (family, needs) in
        [("qwen3_next", "recurrent state"), ("llama4_text", "inputs are weighted"), ("phimoe", "norms")]
    {
        let error = with_key("mixtral", "model_type", Some(json!(family)));
        let CheckpointError::Config(ConfigError::UnsupportedFamily { found, .. }) = &error else { panic!("{error}") };
        assert!(found == family && error.to_string().contains(needs), "{error}");
    }
}

#[test]
fn python_writes_nan_and_infinity_and_the_error_names_their_key() {
    let dir = copy("mixtral");
    let path = dir.path().join("config.json");
    let original = std::fs::read_to_string(&path).unwrap();
    for word in ["NaN", "Infinity", "-Infinity"] {
        std::fs::write(&path, original.replace("1e-05", word)).unwrap();
        let error = open_error(dir.path()).to_string();
        assert!(error.contains("`rms_norm_eps`") && error.contains(word), "{error}");
    }
    std::fs::write(&path, original.replace("\"MixtralForCausalLM\"", "\"NaN \\\" Infinity\", NaN")).unwrap();
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn a_nonsense_rope_is_refused_by_name() {
    let full = json!({"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
    let cases = [
        (json!({"type": "longrope", "factor": 2}), "`rope_scaling.type`"),
        (json!({"rope_type": 7}), "`rope_scaling.rope_type`"),
        (json!({"type": "linear"}), "`rope_scaling.factor`"),
        (json!({"type": "linear", "factor": 0}), "`rope_scaling.factor`"),
        (json!({"type": "yarn"}), "`rope_scaling.factor`"),
        (json!({"type": "yarn", "factor": 2, "beta_fast": -1}), "`rope_scaling.beta_fast`"),
        (json!({"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}), "`rope_scaling.partial_rotary_factor`"),
        (json!({"type": "llama3", "factor": 8}), "`rope_scaling.low_freq_factor`"),
        (json!({"full_attention": {"rope_type": "default"}}), "`rope_scaling.full_attention`"),
        (json!([]), "`rope_scaling`"),
    ];
    for (rope, named) in cases {
        let error = with_key("mixtral", "rope_scaling", Some(rope)).to_string();
        assert!(error.contains(named), "{error}");
    }
    let dir = copy("mixtral");
    edit_json(&dir.path().join("config.json"), |config| config["rope_scaling"] = full);
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn a_config_of_more_experts_than_any_model_has_is_refused_before_their_names_are_listed() {
    let dir = copy("mixtral");
    edit_json(&dir.path().join("config.json"), |config| {
        config["num_hidden_layers"] = json!(1024);
        config["num_local_experts"] = json!(4096);
    });
    let error = open_error(dir.path()).to_string();
    assert!(error.contains("4194304 experts in all layers"), "{error}");
}
