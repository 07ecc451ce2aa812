//! Files that are absent, cut short, too long or no files, and headers that do not hold together.

use super::*;

#[test]
fn files_that_are_absent_or_no_json_are_named() {
    let empty = tempfile::tempdir().unwrap();
    let error = open_error(empty.path());
    assert!(matches!(&error, CheckpointError::Read { path, .. } if path.ends_with("config.json")), "{error}");
    std::fs::write(empty.path().join("config.json"), "[1").unwrap();
    assert!(matches!(open_error(empty.path()), CheckpointError::Config(ConfigError::NotJson(_))));
    std::fs::write(empty.path().join("config.json"), [0xff, 0xfe]).unwrap();
    assert!(matches!(open_error(empty.path()), CheckpointError::NotText { .. }));
    std::fs::write(empty.path().join("config.json"), vec![b' '; (16 << 20) + 1]).unwrap();
    assert!(matches!(open_error(empty.path()), CheckpointError::TooLarge { .. }));
    std::fs::copy(fixture("olmoe").join("config.json"), empty.path().join("config.json")).unwrap();
    assert!(matches!(open_error(empty.path()), CheckpointError::NoWeights { .. }));
}

#[test]
fn a_truncated_or_prolonged_file_is_refused_with_the_bytes_it_should_have() {
    let dir = copy("olmoe");
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for len in [bytes.len() - 1, bytes.len() / 2, 100, 8] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = open_error(dir.path());
        let CheckpointError::Truncated { path: named, expected, found } = &error else { panic!("{len}: {error}") };
        assert!(named == &path && *found == len as u64 && *expected > *found, "{error}");
        assert!(len < bytes.len() / 2 || *expected == bytes.len() as u64);
    }
    for len in [0, 7] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        assert!(matches!(open_error(dir.path()), CheckpointError::Truncated { expected: 8, .. }));
    }
    std::fs::write(&path, [bytes.as_slice(), &[0; 5]].concat()).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::TrailingBytes { extra: 5, .. }));
    std::fs::write(&path, [&u64::MAX.to_le_bytes(), bytes.as_slice()].concat()).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::Header { .. }));
    std::fs::write(&path, raw_file("{".into(), &[], aligned)).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::Header { .. }));
}

#[test]
fn overlapping_and_repeated_tensors_are_named() {
    let dir = copy("olmoe");
    let path = dir.path().join("model.safetensors");
    let info = |start: u64, end: u64| json!({"dtype": "F32", "shape": [1], "data_offsets": [start, end]}).to_string();
    let write = |header: String| std::fs::write(&path, raw_file(header, &[0; 8], aligned)).unwrap();
    for (start, end) in [(0, 4), (2, 6), (u64::MAX - 3, u64::MAX), (6, 10)] {
        write(format!(r#"{{"a": {}, "b": {}}}"#, info(0, 4), info(start, end)));
        let error = open_error(dir.path());
        assert!(matches!(error, CheckpointError::Overlapping { .. }), "{start}: {error}");
    }
    write(format!(r#"{{"a": {}, "b": {}, "a": {}}}"#, info(0, 4), info(4, 8), info(0, 4)));
    let error = open_error(dir.path());
    assert!(
        matches!(&error, CheckpointError::Duplicate { tensor, .. } if tensor == "a")
            || matches!(&error, CheckpointError::Header { .. }),
        "{error}"
    );
    for shape in [json!([u64::MAX, 16]), json!([1u64 << 40]), json!([3])] {
        let b = json!({"dtype": "F32", "shape": shape, "data_offsets": [4, 8]});
        write(format!(r#"{{"a": {}, "b": {b}}}"#, info(0, 4)));
        let error = open_error(dir.path());
        assert!(matches!(&error, CheckpointError::WrongSize { tensor, .. } if tensor == "b"), "{shape}: {error}");
    }
}

#[test]
fn a_tensor_of_a_wrong_size_is_named_when_only_headers_are_at_hand() {
    let config = std::fs::read_to_string(fixture("olmoe").join("config.json")).unwrap();
    let header = json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).to_string();
    let error = weight_map_of_headers(&config, vec![("m".into(), raw_file(header, &[], aligned))]).unwrap_err();
    assert!(matches!(&error, CheckpointError::WrongSize { tensor, .. } if tensor == "a"), "{error}");
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_unopened_and_named() {
    let names = ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors", "tokenizer.json"];
    for name in names {
        let dir = copy("mixtral");
        let path = dir.path().join(name);
        let open = || match name {
            "tokenizer.json" => Tokenizer::load(dir.path()).expect_err(name).to_string(),
            _ => open_error(dir.path()).to_string(),
        };
        let _ = std::fs::remove_file(&path);
        std::fs::create_dir(&path).unwrap();
        assert_eq!(open(), format!("{} is a directory, not a regular file", path.display()));
        std::fs::remove_dir(&path).unwrap();
        let expected = format!("{} is a pipe, a socket or a device, not a regular file", path.display());
        // Nobody writes to it: opening it would wait for ever.
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert_eq!(open(), expected);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert_eq!(open(), expected);
    }
    let dir = copy("olmoe");
    let path = dir.path().join("model.safetensors");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(open_error(dir.path()), CheckpointError::NotAFile { found: "a directory", .. }));
}
