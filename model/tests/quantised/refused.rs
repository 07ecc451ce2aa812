//! What is refused, by name.

use super::*;

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
