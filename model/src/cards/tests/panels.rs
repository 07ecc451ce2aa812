//! Every weight lies where the kernels look for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cards::dtype::Dtype;
use crate::cards::panels::Layout;
use crate::checkpoint::{Biases, Mapping, StoredDtype, Swiglu};
use crate::linear::Matrix;
use crate::linear::reference::{e2m1, e4m3};
use crate::spec::Activation;
use crate::{Checkpoint, Expert};

/// The first experts of models of all families, in f32, f16 and bf16, and of widths that are no whole number of chunks.
fn published() -> Vec<(String, Swiglu)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut dirs: Vec<PathBuf> = vec![root.join("examples/models/tiny-moe")];
    for folder in ["tests/fixtures", "tests/fixtures/extra"] {
        let entries = std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        dirs.extend(entries.filter(|path| path.join("config.json").exists()));
    }
    let opened = dirs.into_iter().filter_map(|dir| Some((Checkpoint::open(&dir).ok()?, dir)));
    let first = |(checkpoint, dir): (Checkpoint, PathBuf)| {
        let (layer, _) = checkpoint.spec().moe_layers().next()?;
        Some((dir.display().to_string(), Expert::load(&checkpoint, layer, 1).unwrap().swiglu))
    };
    opened.filter_map(first).collect()
}

/// Bytes of which none is preferred.
fn noise(seed: usize, count: usize) -> Vec<u8> {
    let mut state = seed as u64 + 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(next).collect()
}

fn mapping(bytes: &[u8]) -> Arc<Mapping> {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(Mapping::of(&file).unwrap())
}

/// A matrix of noise in few bits.
fn matrix(dtype: StoredDtype, outputs: usize, inputs: usize, seed: usize) -> Matrix {
    let bytes = noise(seed, outputs * inputs * 2);
    let scales = noise(seed + 1, outputs * inputs.div_ceil(32) * 4);
    // Exponents between.
    let tame = |bytes: &[u8], at: usize, step: usize| -> Vec<u8> {
        let bytes = bytes.iter().enumerate();
        bytes.map(|(i, byte)| if i % step == at { byte & 0x3f | 0x20 } else { *byte }).collect()
    };
    match dtype {
        StoredDtype::F8E4m3 => {
            let codes: Vec<u8> = bytes.iter().map(|byte| if byte & 0x7f == 0x7f { 0 } else { *byte }).collect();
            Matrix::fp8((&mapping(&codes), 0), (&mapping(&tame(&scales, 3, 4)), 0), outputs, inputs)
        }
        StoredDtype::F4E2m1 => {
            // Every second row, as gpt-oss has gate and up.
            Matrix::mxfp4((&mapping(&bytes), 0), (&mapping(&tame(&scales, 0, 1)), 0), 2, outputs, inputs).unwrap()
        }
        StoredDtype::Q8_0 => Matrix::new(&mapping(&tame(&bytes, 1, 34)), 0, dtype, outputs, inputs).unwrap(),
        StoredDtype::Q4K => {
            Matrix::new(&mapping(&tame(&tame(&bytes, 1, 144), 3, 144)), 0, dtype, outputs, inputs).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

/// Experts in few bits: of each format, of widths that are not whole octets, and of several formats in one.
fn in_few_bits() -> Vec<(String, Swiglu)> {
    use StoredDtype::{F4E2m1, F8E4m3, Q4K, Q8_0};
    let clamped = Activation::ClampedSwiglu { limit: 7.0, alpha: 1.702 };
    let cases = [
        ([Q8_0; 3], 160, 96, Activation::Swiglu),
        ([Q4K; 3], 512, 256, Activation::Swiglu),
        ([F8E4m3; 3], 264, 200, Activation::Swiglu),
        ([F4E2m1; 3], 96, 288, clamped),
        ([Q4K, Q4K, Q8_0], 256, 160, Activation::Swiglu),
        ([Q8_0, Q8_0, Q4K], 32, 256, Activation::Swiglu),
        // Widened.
        ([Q8_0, Q4K, Q8_0], 256, 32, Activation::Swiglu),
    ];
    let swiglu = |(number, ([gate, up, down], hidden, inner, activation)): (
        usize,
        ([StoredDtype; 3], usize, usize, Activation),
    )| {
        let bias = |len: usize| (0..len).map(|i| (i + number) as f32).collect();
        let biases = (activation == clamped).then(|| Biases {
            gate_proj: bias(inner),
            up_proj: bias(inner + 1)[1..].to_vec(),
            down_proj: bias(hidden),
            bytes: 0,
        });
        let swiglu = Swiglu {
            gate_proj: matrix(gate, inner, hidden, 10 * number),
            up_proj: matrix(up, inner, hidden, 10 * number + 2),
            down_proj: matrix(down, hidden, inner, 10 * number + 4),
            activation,
            biases,
        };
        (format!("{gate:?} {up:?} {down:?} {hidden} x {inner}"), swiglu)
    };
    cases.into_iter().enumerate().map(swiglu).collect()
}

pub(super) fn swiglus() -> Vec<(String, Swiglu)> {
    published().into_iter().chain(in_few_bits()).collect()
}

/// Where a value's parts are read from.
struct Place<'a> {
    /// Of the panel.
    values: &'a [u8],
    scales: &'a [u8],
    octet: usize,
    chunk: usize,
    half: usize,
    column: usize,
    /// Of the warp.
    thread: usize,
}

impl Place<'_> {
    /// `SIZE` bytes from byte `at` of this thread's vector number `vector` of the octet, which has `vectors`.
    fn value<const SIZE: usize>(&self, vectors: usize, vector: usize, at: usize) -> [u8; SIZE] {
        let vector = self.octet * vectors * 32 + vector * 32 + self.thread;
        self.values[vector * 16 + at..][..SIZE].try_into().unwrap()
    }

    /// `SIZE` bytes from byte `at` on of vector `vector` of the scales.
    fn scale<const SIZE: usize>(&self, vector: usize, at: usize) -> [u8; SIZE] {
        self.scales[vector * 16 + at..][..SIZE].try_into().unwrap()
    }

    /// The byte of formats of eight bits, and the four bits of others.
    fn byte(&self) -> u8 {
        self.value::<1>(4, self.column / 2, self.column % 2 * 8 + self.chunk)[0]
    }
    fn nibble(&self) -> u8 {
        (u32::from_le_bytes(self.value(2, self.column / 4, self.column % 4 * 4)) >> (4 * self.chunk) & 15) as u8
    }

    fn f32(&self, dtype: Dtype) -> f32 {
        let Self { octet, chunk, half, column, .. } = *self;
        let f16 = |bytes: [u8; 2]| half::f16::from_le_bytes(bytes).to_f32();
        match dtype {
            Dtype::F32 => f32::from_le_bytes(self.value(16, column * 2 + chunk / 4, chunk % 4 * 4)),
            Dtype::F16 => f16(self.value(8, column, chunk * 2)),
            Dtype::Bf16 => half::bf16::from_le_bytes(self.value(8, column, chunk * 2)).to_f32(),
            Dtype::Q8_0 => {
                let scale = f16(self.scale((octet * 2 + half) * 4 + column / 2, column % 2 * 8 + chunk / 2 * 2));
                (f32::from(self.byte()) - 128.0) * scale
            }
            Dtype::Q4K => {
                let head: [u8; 16] = self.scale((octet / 2 * 2 + half) * 8 + column, 0);
                let (six, group) = (&head[4..], octet % 2 * 4 + chunk / 2);
                let (scale, minimum) = if group < 4 {
                    (six[group] & 63, six[group + 4] & 63)
                } else {
                    let (low, high) = (six[group + 4], (six[group - 4] >> 6, six[group] >> 6));
                    (low & 15 | high.0 << 4, low >> 4 | high.1 << 4)
                };
                let (scale, minimum) =
                    (f16([head[0], head[1]]) * f32::from(scale), f16([head[2], head[3]]) * f32::from(minimum));
                f32::from(self.nibble()) * scale - minimum
            }
            Dtype::Fp8 => {
                let at = octet * 8 + column / 4 * 4;
                e4m3(self.byte()) * f32::from_le_bytes(self.scale(at / 16, at % 16))
            }
            Dtype::Mxfp4 => {
                let at = (octet * 2 + half) * 32 + column * 4 + chunk / 2;
                e2m1(self.nibble()) * 2f32.powi(i32::from(self.scale::<1>(at / 16, at % 16)[0]) - 127)
            }
        }
    }
}

/// The value that the kernels read as that of `column` (of a panel) and `input`. Written after `kernels.cu`, not after `columns.rs`.
pub(super) fn read(bytes: &[u8], dtype: Dtype, width: usize, panel: usize, column: usize, input: usize) -> f32 {
    let octets = width.div_ceil(16).div_ceil(8);
    let (vectors, scale_bytes) = match dtype {
        Dtype::F32 => (16, 0),
        Dtype::F16 | Dtype::Bf16 => (8, 0),
        Dtype::Q8_0 => (4, 128),
        Dtype::Q4K => (2, 128),
        Dtype::Fp8 => (4, 8),
        Dtype::Mxfp4 => (2, 64),
    };
    let (values, scales) = (octets * vectors * 32 * 16, (octets * scale_bytes).div_ceil(128) * 128);
    let (values, scales) = bytes[panel * (values + scales)..][..values + scales].split_at(values);
    let (half, thread) = (column / 8, column / 8 * 16 + input % 16);
    let (octet, chunk, column) = (input / 128, input / 16 % 8, column % 8);
    Place { values, scales, octet, chunk, half, column, thread }.f32(dtype)
}

pub(super) fn row(matrix: &Matrix, row: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; matrix.inputs()];
    matrix.widen_row(row, &mut values);
    values
}

#[test]
fn kernels_find_every_weight_and_bias_where_it_lies() {
    let swiglus = swiglus();
    let dtypes: std::collections::BTreeSet<Dtype> =
        swiglus.iter().map(|(_, swiglu)| Layout::of(swiglu).up_dtype).collect();
    assert_eq!(dtypes.into_iter().collect::<Vec<_>>(), Dtype::ALL);
    assert!(swiglus.iter().filter(|(_, swiglu)| swiglu.biases.is_some()).count() > 1);
    for (what, swiglu) in swiglus {
        let layout = Layout::of(&swiglu);
        let mut bytes = vec![0xff; layout.bytes()];
        let pieces = layout.pieces(20_000);
        let mut rest = bytes.as_mut_slice();
        for piece in &pieces {
            let (own, others) = rest.split_at_mut(piece.bytes);
            layout.write(&swiglu, piece, own);
            rest = others;
        }
        assert!(rest.is_empty() && pieces.windows(2).all(|pair| pair[0].at + pair[0].bytes == pair[1].at));
        let (up, down) = bytes.split_at(layout.down_at());
        let (width, inner) = (swiglu.gate_proj.inputs(), swiglu.gate_proj.outputs());
        for number in 0..layout.inner_size {
            let (panel, half, place) = (number / 8, number % 8 / 4, number % 4);
            for (matrix, first) in [(&swiglu.gate_proj, 0), (&swiglu.up_proj, 4)] {
                let expected = if number < inner { row(matrix, number) } else { vec![0.0; width] };
                for (input, expected) in expected.iter().enumerate() {
                    let found = read(up, layout.up_dtype, width, panel, half * 8 + first + place, input);
                    // Those that are not there may be -0.
                    let same = found.to_bits() == expected.to_bits() || (number >= inner && found == 0.0);
                    assert!(same, "{what} {number} {input}: {found} {expected}");
                }
            }
        }
        for number in 0..width {
            for (input, expected) in row(&swiglu.down_proj, number).iter().enumerate() {
                let found = read(down, layout.down_dtype, layout.inner_size, number / 16, number % 16, input);
                assert_eq!(found.to_bits(), expected.to_bits(), "{what} {number} {input}");
            }
        }
        assert_eq!(layout.biases_at().is_some(), swiglu.biases.is_some());
        if let (Some(at), Some(biases)) = (layout.biases_at(), &swiglu.biases) {
            let found: Vec<f32> = bytes[at..].as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
            let padding = vec![0.0; layout.inner_size - inner];
            let expected =
                [&biases.gate_proj, &padding, &biases.up_proj, &padding, &biases.down_proj].map(Vec::as_slice);
            assert_eq!(found, expected.concat(), "{what}");
        }
    }
}

/// Bytes on a card of an expert, and as stored.
fn sizes(dtype: StoredDtype, hidden: usize, inner: usize) -> (usize, u64) {
    let swiglu = Swiglu {
        gate_proj: matrix(dtype, inner, hidden, 0),
        up_proj: matrix(dtype, inner, hidden, 1),
        down_proj: matrix(dtype, hidden, inner, 2),
        activation: Activation::Swiglu,
        biases: None,
    };
    (Layout::of(&swiglu).bytes(), Expert { swiglu }.bytes())
}

#[test]
fn an_expert_takes_little_more_on_a_card_than_in_its_file() {
    for (dtype, hidden, inner, percent) in [
        (StoredDtype::Q8_0, 2048, 768, 0.0),
        (StoredDtype::Q4K, 2048, 768, 0.0),
        (StoredDtype::F8E4m3, 1792, 512, 1.0),
        (StoredDtype::F4E2m1, 2880, 2880, 2.5),
    ] {
        let (on_card, stored) = sizes(dtype, hidden, inner);
        let more = (on_card as f64 / stored as f64 - 1.0) * 100.0;
        println!("{dtype:?} {hidden} x {inner}: {more:.3} % more");
        assert!((0.0..=percent).contains(&more), "{dtype:?} {hidden} x {inner}: {more} % more");
    }
}
