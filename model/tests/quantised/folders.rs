//! Folders that are written again in fewer bits.

use super::*;

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
