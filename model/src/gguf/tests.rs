//! Files that lie, and the widening of blocks.

mod deepseek2;
mod gpt_oss;
mod writer;

use std::path::PathBuf;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

use super::blocks::BlockType;
use super::*;
use writer::{Tensor, Writer, float, list, number, text, texts};

fn import_into(
    folder: &TempDir,
    bytes: &[u8],
    to: impl Into<Option<StoredDtype>>,
) -> (PathBuf, Result<Imported, GgufError>) {
    let (path, out) = (folder.path().join("a.gguf"), folder.path().join("model"));
    std::fs::write(&path, bytes).unwrap();
    let imported = import_gguf(&path, to.into(), &out, &mut |_, _| ());
    (out, imported)
}

/// Why the file is refused; nothing may be left.
fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (_, imported) = import_into(&folder, bytes, StoredDtype::F16);
    let error = imported.unwrap_err().to_string().replace(&folder.path().display().to_string(), "");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the file is left");
    error
}

fn refusal_of(change: impl FnOnce(&mut Writer)) -> String {
    refusal_of_other(Writer::sound(), change)
}

fn refusal_of_other(mut writer: Writer, change: impl FnOnce(&mut Writer)) -> String {
    change(&mut writer);
    refusal(&writer.bytes())
}

/// A folder's config, and how each tensor is stored and what it stands for, which must be plain.
fn imported(writer: &Writer, to: Option<StoredDtype>) -> (Value, BTreeMap<String, (Dtype, Vec<f32>)>) {
    let folder = tempfile::tempdir().unwrap();
    let (out, imported) = import_into(&folder, &writer.bytes(), to);
    imported.unwrap();
    let config = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let plain = |(name, view): (&str, TensorView<'_>)| {
        let id =
            [(Dtype::F32, 0), (Dtype::F16, 1), (Dtype::BF16, 30)].into_iter().find(|(dtype, _)| *dtype == view.dtype());
        Some((name.to_owned(), (view.dtype(), BlockType::of(id?.1).unwrap().widen(view.data()).unwrap())))
    };
    (config, tensors.iter().filter_map(plain).collect())
}

#[test]
fn a_sound_file_is_imported_and_says_what_was_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (out, imported) = import_into(&folder, &Writer::sound().bytes(), StoredDtype::F16);
    let imported = imported.unwrap();
    assert_eq!((imported.architecture.as_str(), imported.tensors, imported.types["F32"]), ("qwen2", 14, 14));
    assert_eq!(Tokenizer::load(&out).unwrap().encode("ab<end>ba", true).unwrap(), [2, 3, 1, 0]);
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!((checkpoint.spec().rms_norm_eps, checkpoint.spec().tied_embeddings), (1e-6, true));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Writer::sound().bytes();
    let step = bytes.len() / 97;
    for end in (0..bytes.len()).step_by(step).chain([bytes.len() - 1]) {
        let folder = tempfile::tempdir().unwrap();
        assert!(import_into(&folder, &bytes[..end], StoredDtype::F16).1.is_err(), "cut at {end}");
    }
}

#[test]
fn what_is_no_gguf_file_is_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut file = Writer::sound().bytes();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&file)
    };
    let not = "/a.gguf is not a GGUF file that can be read: ";
    assert_eq!(with(0, b"GGML"), format!("{not}it does not begin with GGUF"));
    assert_eq!(with(4, &[1, 0, 0, 0]), format!("{not}version 1 is not supported; newer tools write version 3"));
    assert_eq!(with(4, &[0, 0, 0, 3]), format!("{not}its numbers are big-endian"));
    assert_eq!(with(4, &[9, 0, 0, 0]), format!("{not}its version is 9; supported are 2 and 3"));
    let many = u64::MAX.to_le_bytes();
    assert!(with(8, &many).contains("it says that it has 18446744073709551615 tensors"));
    assert!(with(16, &many).contains("it says that it has 18446744073709551615 metadata keys"));
    assert!(with(24, &many).contains("a metadata key has 18446744073709551615 bytes"));
}

#[test]
fn metadata_that_lie_are_refused_by_key() {
    let set = |key: &str, value: Vec<u8>| refusal_of(|writer| writer.set(key, value));
    let damaged = "/a.gguf is damaged: ";
    assert_eq!(
        set("x", 99u32.to_le_bytes().to_vec()),
        format!("{damaged}`x` has a value of type 99, which does not exist")
    );
    assert_eq!(
        set("x", [7u32.to_le_bytes().to_vec(), vec![2]].concat()),
        format!("{damaged}`x` is 2, neither true nor false")
    );
    assert_eq!(set("x", list(9, 1, &[])), format!("{damaged}`x` is an array of arrays, which is not supported"));
    assert_eq!(set("x", list(77, 1, &[])), format!("{damaged}`x` has elements of type 77, which does not exist"));
    assert_eq!(set("x", list(8, 1 << 22, &[])), format!("{damaged}it ends within `x`"));
    assert_eq!(
        set("x", list(10, 1 << 40, &[])),
        format!("{damaged}`x` has 1099511627776 elements; at most 4194304 are read")
    );
    assert_eq!(
        set("x", list(8, 1, &(1u64 << 50).to_le_bytes())),
        format!("{damaged}x has 1125899906842624 bytes; at most 16777216 are read")
    );
    assert_eq!(
        set("x", [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[255]].concat()),
        format!("{damaged}x is not UTF-8 text")
    );
    let twice = refusal_of(|writer| writer.keys.push(("qwen2.block_count".to_owned(), number(1))));
    assert_eq!(twice, format!("{damaged}`qwen2.block_count` is there twice"));
    for alignment in [0, 3, 1 << 21] {
        let told = set("general.alignment", number(alignment));
        assert_eq!(
            told,
            format!("the file's `general.alignment` is {alignment}, but it must be a power of two, at most 1048576")
        );
    }
}

#[test]
fn models_that_are_not_understood_are_refused_by_key() {
    let set = |key: &str, value: Vec<u8>| refusal_of(|writer| writer.set(key, value));
    let told = set("general.architecture", text("rwkv"));
    assert_eq!(
        told,
        "the file's architecture is `rwkv`; supported are deepseek2, gpt-oss, llama, olmoe, qwen2, qwen2moe, qwen3, qwen3moe"
    );
    assert_eq!(
        set("qwen2.logit_scale", float(2.0)),
        "the file's `qwen2.logit_scale` is not understood: what it changes is not supported"
    );
    assert!(set("qwen2.rope.scaling.type", text("longrope")).contains("known are none, linear and yarn"));
    assert!(set("qwen2.rope.dimension_count", number(4)).contains("heads have 8 values"));
    assert!(set("qwen2.attention.head_count", number(0)).contains("it must be 1 or above"));
    assert!(set("qwen2.attention.head_count", text("four")).contains("is \"four\", but it must be a whole number"));
    assert!(set("qwen2.attention.layer_norm_rms_epsilon", float(f32::NAN)).contains("it must be a finite number"));
    assert_eq!(set("qwen2.block_count", number(1 << 20)), "tensor `blk.1048575.attn_norm.weight` is missing");
    assert!(set("qwen2.embedding_length", number(1 << 30)).contains("`hidden_size` is 1073741824"));
    assert_eq!(
        refusal_of(|writer| writer.keys.retain(|(key, _)| key != "qwen2.block_count")),
        "the file has no `qwen2.block_count`"
    );
    assert_eq!(
        set("split.count", number(2)),
        "/a.gguf is not a GGUF file that can be read: it is one of 2 files: give the first, whose name ends in -00001-of-00002.gguf"
    );
}

#[test]
fn vocabularies_that_are_not_understood_are_refused() {
    let set = |key: &str, value: Vec<u8>| refusal_of(|writer| writer.set(key, value));
    assert_eq!(
        set("tokenizer.ggml.model", text("bert")),
        "the file's `tokenizer.ggml.model` is `bert`; supported are gpt2, llama"
    );
    assert!(
        set("tokenizer.ggml.pre", text("viking"))
            .starts_with("the file's `tokenizer.ggml.pre` is `viking`; supported are default, gpt-2")
    );
    assert!(set("tokenizer.ggml.tokens", texts(&["a", "b", "a", "c"])).contains("\"a\" is there twice"));
    assert!(set("tokenizer.ggml.tokens", texts(&["a"; 3])).contains("there are 3 tokens"));
    assert!(set("tokenizer.ggml.merges", texts(&["ab"])).contains("\"ab\" is not two parts"));
    assert!(set("tokenizer.ggml.merges", texts(&["a c"])).contains("is not a tokenizer"));
    assert!(set("tokenizer.ggml.eos_token_id", number(4)).contains("is 4, but there are 4 tokens"));
    assert!(set("tokenizer.chat_template", text("{% if %}")).contains("the chat template is malformed"));
    let six = texts(&["a", "b", "c", "d", "e", "f"]);
    let many = refusal_of(|writer| {
        writer.set("tokenizer.ggml.tokens", six);
        writer.keys.retain(|(key, _)| key != "tokenizer.ggml.token_type" && key != "tokenizer.ggml.merges");
        writer.set("tokenizer.ggml.merges", texts(&[]));
    });
    assert_eq!(many, "tensor `token_embd.weight`: there are 6 tokens and 5 embeddings");
}

#[test]
fn tensors_that_lie_are_refused_by_name() {
    let with = |name: &str, change: fn(&mut Tensor)| refusal_of(|writer| change(writer.named(name)));
    let of = |reason: &str| format!("tensor `blk.0.ffn_up.weight`: {reason}");
    let up = |change: fn(&mut Tensor)| with("blk.0.ffn_up.weight", change);
    assert!(up(|tensor| tensor.kind = 19).starts_with(&of("it is stored as IQ1_S; supported are F32, F16, Q4_0")));
    assert!(up(|tensor| tensor.kind = 999).starts_with(&of("it is stored as 999; supported are")));
    assert_eq!(up(|tensor| tensor.shape = vec![]), of("it has 0 dimensions, not 1 to 4"));
    assert_eq!(up(|tensor| tensor.shape = vec![1; 9]), of("it has 9 dimensions, not 1 to 4"));
    assert_eq!(up(|tensor| tensor.shape = vec![32, 0]), of("it has a dimension of 0, not 1 to 2147483648"));
    assert_eq!(up(|tensor| tensor.shape = vec![1 << 31; 3]), of("it is larger than any file"));
    assert_eq!(
        up(|tensor| tensor.offset += 4),
        format!(
            "{}",
            of(&format!("it begins at {}, which is not a multiple of 32", offset_of("blk.0.ffn_up.weight") + 4))
        )
    );
    assert_eq!(up(|tensor| tensor.offset = 1 << 40), of("its bytes end beyond the end of /a.gguf"));
    assert_eq!(up(|tensor| tensor.offset = u64::MAX - 31), of("it is larger than any file"));
    assert_eq!(up(|tensor| tensor.shape = vec![16, 32]), of("it has shape [32, 16], expected [32, 32]"));
    assert!(up(|tensor| tensor.shape = vec![33, 32]).contains("overlap"));
    assert_eq!(
        up(|tensor| (tensor.kind, tensor.shape) = (8, vec![33, 32])),
        of("its rows of 33 values are no whole blocks of 32 (Q8_0)")
    );
    assert_eq!(
        up(|tensor| tensor.name = "blk.0.ffn_down.weight".to_owned()),
        "tensor `blk.0.ffn_down.weight`: it is there twice"
    );
    assert_eq!(up(|tensor| tensor.name = "x".to_owned()), "tensor `blk.0.ffn_up.weight` is missing");
    let more = refusal_of(|writer| writer.tensor("blk.0.attn_sinks.weight", &[4]));
    assert_eq!(more, "tensor `blk.0.attn_sinks.weight` is not understood: what it changes is not supported");
}

fn offset_of(name: &str) -> u64 {
    Writer::sound().named(name).offset
}

#[test]
fn values_that_are_not_finite_or_too_large_are_refused_by_tensor() {
    let with = |value: f32| {
        let mut writer = Writer::sound();
        writer.named("blk.0.attn_q.weight").data[64..68].copy_from_slice(&value.to_le_bytes());
        writer
    };
    let name = "tensor `model.layers.0.self_attn.q_proj.weight`: it holds ";
    assert_eq!(refusal(&with(f32::NAN).bytes()), format!("{name}NaN: the file is damaged"));
    assert_eq!(refusal(&with(f32::INFINITY).bytes()), format!("{name}inf: the file is damaged"));
    // As blocks of 32 values with one scale, which f16 holds and their products need not.
    let mut writer = Writer::sound();
    let tensor = writer.named("blk.0.attn_q.weight");
    tensor.kind = 8;
    tensor.data = [&half::f16::from_f32(1000.0).to_le_bytes()[..], &[127; 32]].concat().repeat(32);
    let told = refusal(&writer.bytes());
    assert_eq!(told, format!("{name}127000, which the chosen dtype cannot: f32 can"));
    let folder = tempfile::tempdir().unwrap();
    import_into(&folder, &writer.bytes(), StoredDtype::F32).1.unwrap();
}

/// Random blocks and what gguf-py makes of them.
#[test]
fn blocks_of_every_type_are_widened_as_their_authors_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf/blocks.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    for id in [2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 39] {
        let kind = BlockType::of(id).unwrap();
        let (blocks, values) = (
            golden.tensor(&format!("{}.bytes", kind.name)).unwrap(),
            golden.tensor(&format!("{}.values", kind.name)).unwrap(),
        );
        assert_eq!((blocks.shape()[1], values.shape()[1]), (kind.bytes, kind.values), "{}", kind.name);
        let expected: Vec<f32> =
            values.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(kind.widen(blocks.data()).unwrap(), expected, "{}", kind.name);
        // Also where they are not aligned.
        let moved = [&[0], blocks.data()].concat();
        assert_eq!(kind.widen(&moved[1..]).unwrap(), expected, "{}", kind.name);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    /// Whatever is in a file, it is imported or refused.
    #[test]
    fn no_change_of_bytes_leads_to_a_panic(
        which in 0usize..3,
        changes in proptest::collection::vec((0usize..3000, proptest::num::u8::ANY), 1..6),
    ) {
        let mut bytes = [Writer::sound, deepseek2::sound, gpt_oss::sound][which]().bytes();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        let (out, imported) = import_into(&folder, &bytes, None);
        proptest::prop_assert_eq!(imported.is_ok(), out.exists());
    }
}
