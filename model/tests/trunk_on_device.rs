//! A trunk on a card gives the bits that it gives on the processor: every family, however a prompt is cut, alone and beside others.
//!
//! Which card is said by `HANSE_TEST_TRUNK`, as `hanse generate --device` has it; the tests are ignored, and are run by
//! `HANSE_TEST_TRUNK=cuda:0 cargo test -p hanse-model --features cuda --test trunk_on_device -- --include-ignored`.

mod common;

use std::path::{Path, PathBuf};

use common::{Local, bits, dense, fixture, fixtures, tiny_moe};
use half::{bf16, f16};
use hanse_model::{
    Checkpoint, DeviceChoice, KvCache, LogitsWanted, Placement, Precision, Segment, StoredDtype, TrunkCard,
    quantise_folder,
};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

fn card() -> TrunkCard {
    let name = std::env::var("HANSE_TEST_TRUNK").expect("HANSE_TEST_TRUNK says which card is tested");
    let choice: DeviceChoice = name.parse().unwrap();
    choice.open_for_trunk().unwrap().expect("the processor is no card")
}

/// A model on the processor, and with its trunk on the card.
fn both(dir: &Path, card: &TrunkCard) -> (Local, Local, Placement) {
    let on_card = Local::open(dir);
    let placement = on_card.trunk.place(card).unwrap();
    assert_eq!(placement.no_room_bytes, 0, "{}", dir.display());
    (Local::open(dir), on_card, placement)
}

/// The same logits of two models, whose prompts are cut in this way.
fn compare(here: &mut Local, there: &mut Local, prompt: &[u32], cuts: &[usize], what: &str) {
    let (mut cache, mut other) = (here.trunk.new_cache(), there.trunk.new_cache());
    let mut first = 0;
    for end in cuts.iter().copied().chain([prompt.len()]) {
        let tokens = &prompt[first..end];
        let expected = here.forward(tokens, &mut cache, LogitsWanted::All);
        let found = there.forward(tokens, &mut other, LogitsWanted::All);
        assert!(expected.iter().all(|logit| logit.is_finite()), "{what}: logits are numbers");
        assert!(bits(&expected) == bits(&found), "{what}: tokens {first} to {end}");
        first = end;
    }
}

fn prompt(model: &Local, len: usize) -> Vec<u32> {
    let vocab = model.trunk.spec().vocab_size as u32;
    (0..len as u32).map(|i| (i * 7919 + 13) % vocab).collect()
}

#[test]
#[ignore = "needs HANSE_TEST_TRUNK"]
fn every_family_has_the_processors_bits_in_one_piece_in_pieces_and_token_by_token() {
    let card = card();
    for dir in fixtures().into_iter().chain(dense()).chain([tiny_moe()]) {
        let (mut here, mut there, placement) = both(&dir, &card);
        assert!(placement.bytes > 0, "{}", dir.display());
        let prompt = prompt(&here, 13);
        for cuts in [&[][..], &[5, 6, 8], &[12], &[1, 2, 3, 4]] {
            compare(&mut here, &mut there, &prompt, cuts, &format!("{} {cuts:?}", dir.display()));
        }
    }
    assert!(!card.has_failed());
}

#[test]
#[ignore = "needs HANSE_TEST_TRUNK"]
fn sequences_that_advance_together_have_the_processors_bits() {
    let card = card();
    for name in ["mixtral", "qwen2_moe", "deepseek_v3", "extra/deepseek_v32"] {
        let (mut here, mut there, _) = both(&fixture(name), &card);
        let prompt = prompt(&here, 30);
        let advance = |model: &mut Local| {
            let mut caches: Vec<KvCache> = (0..3).map(|_| model.trunk.new_cache()).collect();
            let mut all = Vec::new();
            // Of different lengths; then all a token at a time.
            for round in [&[0..9, 3..4, 10..12], &[9..10, 4..5, 12..13], &[10..11, 5..6, 13..14]] {
                let segments = caches.iter_mut().zip(round.iter().cloned());
                let mut segments: Vec<Segment<'_>> = segments
                    .map(|(cache, range)| Segment { tokens: &prompt[range], cache, logits: LogitsWanted::Last })
                    .collect();
                all.extend(model.trunk.forward(&mut segments, &mut model.experts).unwrap().concat());
            }
            bits(&all)
        };
        assert!(advance(&mut here) == advance(&mut there), "{name}");
    }
}

/// A piece has at most 256 rows.
#[test]
#[ignore = "needs HANSE_TEST_TRUNK"]
fn a_prompt_of_more_rows_than_a_card_takes_at_a_time_has_the_processors_bits() {
    let (mut here, mut there, _) = both(&tiny_moe(), &card());
    let prompt = prompt(&here, 300);
    let forward = |model: &mut Local| {
        let mut cache = model.trunk.new_cache();
        // The last token sees what all others have left.
        [&prompt[..299], &prompt[299..]].map(|tokens| bits(&model.forward(tokens, &mut cache, LogitsWanted::Last)))
    };
    assert!(forward(&mut here) == forward(&mut there));
}

/// The fixture `mixtral` with its trunk's tensors in these dtypes, by name.
fn in_dtypes(dtype: impl Fn(&str) -> Dtype) -> tempfile::TempDir {
    let (dir, from) = (tempfile::tempdir().unwrap(), fixture("mixtral"));
    let mut written: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let paths = std::fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path());
    let is_shard = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("model");
    for path in paths.filter(is_shard).filter(|path| path.extension().is_some_and(|end| end == "safetensors")) {
        let bytes = std::fs::read(path).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
            let values = tensor.data().chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
            let dtype = dtype(name);
            let data = match dtype {
                Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
                Dtype::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
                _ => tensor.data().to_vec(),
            };
            written.push((name.to_owned(), dtype, tensor.shape().to_vec(), data));
        }
    }
    let views =
        written.iter().map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

#[test]
#[ignore = "needs HANSE_TEST_TRUNK"]
fn every_dtype_and_projections_of_different_ones_have_the_processors_bits() {
    let card = card();
    let mixed = |name: &str| match name {
        _ if name.contains("q_proj") || name.contains("embed") => Dtype::BF16,
        _ if name.contains("k_proj") || name.contains("lm_head") => Dtype::F16,
        _ => Dtype::F32,
    };
    for dir in [in_dtypes(|_| Dtype::F32), in_dtypes(|_| Dtype::F16), in_dtypes(|_| Dtype::BF16), in_dtypes(mixed)] {
        let (mut here, mut there, _) = both(dir.path(), &card);
        let prompt = prompt(&here, 40);
        compare(&mut here, &mut there, &prompt, &[37, 38], "dtypes");
    }
}

#[test]
#[ignore = "needs HANSE_TEST_TRUNK"]
fn a_quantised_trunk_has_the_processors_bits() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("q8");
    let precision = Precision { experts: StoredDtype::F16, trunk: Some(StoredDtype::Q8_0) };
    let (checkpoint, of) = (Checkpoint::open(&tiny_moe()).unwrap(), "0".repeat(64));
    quantise_folder(&checkpoint, precision, &of, &[], &to, &mut |_, _| ()).unwrap();
    let (mut here, mut there, _) = both(&to, &card());
    let prompt = prompt(&here, 12);
    compare(&mut here, &mut there, &prompt, &[8], "q8_0");
}
