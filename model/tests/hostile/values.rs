//! Weights that are infinite or no numbers.

use super::*;

#[test]
fn weights_that_are_no_numbers_are_refused_naming_the_tensor() {
    let cases = [
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_layernorm.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.input_layernorm.weight"),
        ("gpt_oss", "model.layers.1.mlp.router.bias"),
        ("gpt_oss", "model.layers.2.self_attn.sinks"),
        ("gpt_oss", "model.layers.3.self_attn.q_proj.bias"),
        ("gpt_oss", "model.norm.weight"),
    ];
    let spoilt = |family: &str, name: &str, place: usize, value: f32| {
        let dir = copy(family);
        let mut tensors = tensors(dir.path());
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        tensor.bytes[4 * place..4 * place + 4].copy_from_slice(&value.to_le_bytes());
        write_single(dir.path(), &tensors, aligned);
        (Checkpoint::open(dir.path()).unwrap(), dir)
    };
    let pool = std::sync::Arc::new(compute_pool(1).unwrap());
    for (family, name) in cases {
        for value in [f32::NAN, f32::INFINITY] {
            let (checkpoint, _dir) = spoilt(family, name, 2, value);
            let error = Trunk::load(&checkpoint, pool.clone()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("place 2") && error.contains(&value.to_string()), "{error}");
        }
    }
    let (checkpoint, _dir) = spoilt("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias", 48 * 3 + 5, f32::NAN);
    Expert::load(&checkpoint, 1, 2).unwrap();
    let error = Expert::load(&checkpoint, 1, 3).unwrap_err().to_string();
    assert!(error.contains("bias of up_proj of expert 3 of layer 1") && error.contains("place 2"), "{error}");
}

/// The hashes of a folder's parts as they are.
fn hashes(dir: &Path) -> PartHashes {
    let map = Checkpoint::open(dir).unwrap().weight_map().unwrap();
    let files: Vec<Vec<u8>> = map.files.iter().map(|name| std::fs::read(dir.join(name)).unwrap()).collect();
    let hash = |pieces: &[Piece]| {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update(&files[piece.file][piece.offset as usize..(piece.offset + piece.bytes) as usize]);
        }
        *hasher.finalize().as_bytes()
    };
    let trunk = map.parts.trunk.iter().zip(&map.trunk).map(|(part, piece)| (part.name.clone(), hash(&[*piece])));
    let experts = map.parts.experts.iter().zip(&map.experts);
    PartHashes {
        trunk: trunk.collect(),
        experts: experts.map(|(part, all)| (part.layer, all.iter().map(|pieces| hash(pieces)).collect())).collect(),
    }
}

#[test]
fn what_is_compared_with_its_hash_is_searched_for_weights_that_are_no_numbers() {
    for (spoilt, named) in [
        ("model.layers.1.mlp.experts.7.up_proj.weight", "expert 7 of layer 1 has NaN at place 385"),
        (
            "model.layers.0.self_attn.kv_b_proj.weight",
            "tensor `model.layers.0.self_attn.kv_b_proj.weight` has NaN at place 1",
        ),
    ] {
        let dir = copy("deepseek_v3");
        let mut tensors = tensors(dir.path());
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == spoilt).unwrap();
        tensor.bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        write_single(dir.path(), &tensors, aligned);
        let load = |checkpoint: &Checkpoint| {
            let pool = std::sync::Arc::new(compute_pool(1).unwrap());
            Trunk::load(checkpoint, pool).map(|_| ()).and(Expert::load(checkpoint, 1, 7).map(|_| ()))
        };
        load(&Checkpoint::open(dir.path()).unwrap()).unwrap();
        let checkpoint = Checkpoint::open_verified(dir.path(), hashes(dir.path())).unwrap();
        let error = load(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
        Expert::load(&checkpoint, 1, 6).unwrap();
    }
}
