//! Checkpoints with random weights are checkpoints, of every family.

use std::path::Path;
use std::sync::Arc;

use hanse_examples::random_checkpoint::{MakeError, Output, Shape, make};
use hanse_model::{Checkpoint, LocalExperts, LogitsWanted, Segment, Trunk, compute_pool, known_families};
use hanse_router::weights::model_id;
use safetensors::Dtype;

/// Odd on purpose: no two sizes are the same.
fn shape(family: &str) -> Shape {
    Shape {
        family: family.to_owned(),
        hidden: 48,
        layers: 2,
        experts: 6,
        top_k: 2,
        intermediate: 20,
        shared_intermediate: 36,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: 101,
        positions: 64,
        tied: false,
    }
}

fn output(shards: usize) -> Output {
    Output { dtype: Dtype::BF16, seed: 7, shards, tokenizer: None }
}

fn made(shape: &Shape, output: &Output) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    make(shape, output, dir.path(), |_, _| {}).unwrap();
    dir
}

/// Logits of a prompt at every position, then of two greedy tokens.
fn logits(dir: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let pool = Arc::new(compute_pool(1).unwrap());
    let trunk = Trunk::load(&checkpoint, pool.clone()).unwrap();
    let mut experts = LocalExperts::load(&checkpoint, pool).unwrap();
    let mut cache = trunk.new_cache();
    let mut all: Vec<f32> = Vec::new();
    let mut tokens = vec![3, 100, 0];
    for _ in 0..3 {
        let mut segments = [Segment { tokens: &tokens, cache: &mut cache, logits: LogitsWanted::All }];
        let answer = trunk.forward(&mut segments, &mut experts).unwrap().remove(0);
        let last = &answer[answer.len() - checkpoint.spec().vocab_size..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        tokens = vec![best as u32];
        all.extend(answer);
    }
    all
}

#[test]
fn every_known_family_can_be_made_and_generates() {
    for family in known_families().split(", ") {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let dir = made(&shape(family), &Output { dtype, ..output(1) });
            let logits = logits(dir.path());
            let mean_square = logits.iter().map(|v| v * v).sum::<f32>() / logits.len() as f32;
            assert!(
                (0.3..3.0).contains(&mean_square.sqrt()),
                "{family}, {dtype:?}: logits of size {}",
                mean_square.sqrt()
            );
        }
    }
}

#[test]
fn sharded_logits_and_model_id_equal_unsharded_ones() {
    for family in known_families().split(", ") {
        let (whole, cut) = (made(&shape(family), &output(1)), made(&shape(family), &output(3)));
        assert!(cut.path().join("model-00003-of-00003.safetensors").exists());
        assert_eq!(logits(whole.path()), logits(cut.path()), "{family}");
        let id = |dir: &Path| model_id(&Checkpoint::open(dir).unwrap()).unwrap();
        assert_eq!(id(whole.path()), id(cut.path()), "{family}");
    }
}

#[test]
fn the_same_seed_gives_the_same_files_and_another_seed_other_ones() {
    let weights = |seed| {
        let dir = made(&shape("olmoe"), &Output { seed, ..output(1) });
        std::fs::read(dir.path().join("model.safetensors")).unwrap()
    };
    assert_eq!(weights(1), weights(1));
    assert_ne!(weights(1), weights(2));
}

#[test]
fn a_tied_checkpoint_has_no_lm_head_and_generates() {
    let dir = made(&Shape { tied: true, ..shape("granitemoe") }, &output(1));
    assert!(Checkpoint::open(dir.path()).unwrap().spec().tied_embeddings);
    assert!(logits(dir.path()).iter().all(|v| v.is_finite()));
}

#[test]
fn a_file_for_each_tensor_is_the_most_and_none_is_empty() {
    let shape = Shape { layers: 1, ..shape("mixtral") };
    let dir = tempfile::tempdir().unwrap();
    let count = match make(&shape, &output(9999), dir.path(), |_, _| {}) {
        Err(MakeError::Shards { tensors, .. }) => tensors,
        other => panic!("{other:?}"),
    };
    let dir = made(&shape, &output(count));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().filter(|e| is_weights(e.as_ref().unwrap())).count(), count);
    Checkpoint::open(dir.path()).unwrap();
}

fn is_weights(entry: &std::fs::DirEntry) -> bool {
    entry.path().extension().is_some_and(|extension| extension == "safetensors")
}

#[test]
fn an_unknown_family_is_refused_with_the_list_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let error = make(&shape("gpt2"), &output(1), dir.path(), |_, _| {}).unwrap_err().to_string();
    assert_eq!(error, format!("unknown model family `gpt2`; known families: {}", known_families()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_holds_something_is_left_alone() {
    let dir = made(&shape("olmoe"), &output(1));
    let again = make(&shape("mixtral"), &output(1), dir.path(), |_, _| {});
    assert!(matches!(again, Err(MakeError::NotEmpty(_))), "{again:?}");
    assert_eq!(Checkpoint::open(dir.path()).unwrap().spec().family, "olmoe");
}

#[test]
fn the_tokenizer_is_copied() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-moe");
    let dir = made(&shape("olmoe"), &Output { tokenizer: Some(source), ..output(1) });
    let tokenizer = hanse_model::Tokenizer::load(dir.path()).unwrap();
    assert!(!tokenizer.encode("Once upon a time", true).unwrap().is_empty());
    assert!(tokenizer.chat_template().unwrap().is_some());
}
