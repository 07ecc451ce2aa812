//! The pure parts, and that the PTX is that of the source. What runs on a card is in `tests/devices.rs`.

mod panels;

use std::sync::LazyLock;

use panels::{read, row, swiglus};
use proptest::prelude::*;

use super::dtype::Dtype;
use super::panels::{CHUNK, Layout};
use super::plain::{Plain, TOGETHER, plan as product};
use super::plan::{Class, PIECE_ROWS, Wanted, kernel_name, plan, room};
use crate::spec::Activation;

proptest! {
    #[test]
    fn a_pass_computes_every_row_once_in_few_launches(rows in proptest::collection::vec(0usize..700, 0..20), which in 0usize..100) {
        static LAYOUTS: LazyLock<Vec<(Layout, Activation)>> =
            LazyLock::new(|| swiglus().iter().map(|(_, swiglu)| (Layout::of(swiglu), swiglu.activation)).collect());
        let layouts = &*LAYOUTS;
        let jobs: Vec<Wanted> = rows
            .iter()
            .enumerate()
            .map(|(job, &rows)| {
                let (layout, activation) = layouts[(job + which) % layouts.len()];
                Wanted { layout, activation, weights: (job as u64 + 1) << 32, rows }
            })
            .collect();
        let rooms = || layouts.iter().map(|(layout, _)| room(layout.hidden_size, layout.inner_size));
        let most = |of: fn((usize, usize, usize)) -> usize| rooms().map(of).max().unwrap();
        let mut next = vec![0; jobs.len()];
        for piece in plan(&jobs) {
            let (mut x, mut y) = (0, 0);
            for part in &piece.parts {
                prop_assert_eq!((part.rows.start, part.x, part.y), (next[part.job], x, y));
                next[part.job] = part.rows.end;
                let layout = jobs[part.job].layout;
                x += part.rows.len() * layout.x_size();
                y += part.rows.len() * layout.hidden_size;
            }
            prop_assert_eq!((piece.x, piece.y, piece.groups.len()), (x, y, piece.parts.len()));
            prop_assert!(piece.parts.iter().map(|part| part.rows.len()).sum::<usize>() <= PIECE_ROWS);
            prop_assert!(piece.x <= most(|room| room.0) && piece.inner <= most(|room| room.1) && piece.y <= most(|room| room.2));
            let classes: Vec<Class> = piece.launches.iter().map(|launch| launch.class).collect();
            prop_assert!(classes.is_sorted_by(|a, b| a < b), "each class once: {classes:?}");
            let mut taken = vec![false; piece.inner];
            let mut first = 0;
            for launch in &piece.launches {
                prop_assert_eq!(launch.groups.start, first);
                first = launch.groups.end;
                let (mut up, mut down) = (0, 0);
                for group in &piece.groups[launch.groups.clone()] {
                    prop_assert_eq!((group.blocks_before_up, group.blocks_before_down), (up, down));
                    let part = piece.parts.iter().find(|part| part.x as u64 == group.x && part.y as u64 == group.y);
                    let part = part.unwrap();
                    let wanted = jobs[part.job];
                    prop_assert_eq!((group.gate_up, group.rows as usize), (wanted.weights, part.rows.len()));
                    prop_assert_eq!(group.down, wanted.weights + wanted.layout.down_at() as u64);
                    prop_assert_eq!(group.biases, wanted.layout.biases_at().map_or(0, |at| wanted.weights + at as u64));
                    match wanted.activation {
                        Activation::Swiglu => prop_assert!(group.limit.is_nan() && group.alpha == 1.0),
                        Activation::ClampedSwiglu { limit, alpha } => prop_assert_eq!((group.limit, group.alpha), (limit, alpha)),
                    }
                    prop_assert_eq!(launch.class.many, part.rows.len() > 2);
                    let inner = group.inner as usize;
                    for place in &mut taken[inner..inner + part.rows.len() * wanted.layout.inner_size] {
                        prop_assert!(!std::mem::replace(place, true), "rows between share no place");
                    }
                    up += covered(group.rows, group.side, launch.class, wanted.layout.inner_size / 8);
                    down += covered(group.rows, group.side, launch.class, wanted.layout.hidden_size.div_ceil(16));
                }
                prop_assert_eq!((launch.up_blocks, launch.down_blocks), (up, down));
            }
            prop_assert!(first == piece.groups.len() && taken.into_iter().all(|taken| taken));
        }
        prop_assert_eq!(next, rows);
    }
}

/// Blocks that compute each tile and panel once, found by doing what the kernels do. Written after `find_tile` in `kernels.cu`.
fn covered(rows: u32, side: u32, class: Class, panels: usize) -> u32 {
    let (warps, tiles) = (class.threads() / 32, (rows as usize).div_ceil(class.tile()));
    let row_blocks = (tiles as u32).div_ceil(1 << side);
    let mut seen = vec![vec![false; panels]; tiles];
    let mut block = 0;
    while seen.iter().flatten().any(|seen| !seen) {
        for warp in 0..warps {
            let tile = ((block % row_blocks) << side) + (warp & ((1 << side) - 1));
            let panel = block / row_blocks * (warps >> side) + (warp >> side);
            if let Some(seen) = seen.get_mut(tile as usize).and_then(|row| row.get_mut(panel as usize)) {
                assert!(!std::mem::replace(seen, true));
            }
        }
        block += 1;
        assert!(block < 100_000);
    }
    // The last blocks may have warps without work, but each has some with.
    block
}

#[test]
fn the_ptx_is_made_of_the_source_and_has_every_kernel() {
    let hash = blake3::hash(include_bytes!("cuda/kernels.cu"));
    let first = super::PTX.lines().next().unwrap();
    assert!(first.contains(&hash.to_hex().to_string()), "kernels.cu has changed: run tests/cuda/ptx.sh; {first}");
    for (many, dtype) in [false, true].into_iter().flat_map(|many| Dtype::ALL.map(|dtype| (many, dtype))) {
        let entry = format!(".visible .entry {}(", kernel_name(many, dtype));
        assert!(super::PTX.contains(&entry), "{entry}");
    }
    // Older drivers and cards read no later ones.
    assert!(super::PTX.contains("\n.version 7.8\n") && super::PTX.contains("\n.target sm_60\n"));
    // Sums are fused where the source says so and nowhere else, and nothing is approximated or flushed to zero.
    for inexact in [".ftz", ".approx", ".full", "ex2", "mad.f32", "mad.rn"] {
        assert!(!super::PTX.contains(inexact), "{inexact}");
    }
    assert_eq!(CHUNK, 16);
}

#[test]
fn metals_source_has_every_kernel() {
    for dtype in Dtype::ALL {
        assert!(super::METAL.contains(&format!("    KERNEL({}, ", dtype.name())), "{dtype:?}");
    }
    for many in [false, true] {
        let class = Class { many, up: Dtype::F32, down: Dtype::F32 };
        assert!(super::METAL.contains(&format!("\nKERNELS({}, {})\n", class.tile(), class.threads())), "{class:?}");
    }
}

#[test]
fn kernels_find_every_weight_of_a_matrix_by_itself_where_it_lies() {
    for (what, swiglu) in swiglus() {
        for matrix in [&swiglu.gate_proj, &swiglu.up_proj, &swiglu.down_proj] {
            let plain = Plain::of(matrix);
            let mut bytes = vec![0xff; plain.bytes()];
            let pieces = plain.pieces(10_000);
            let mut rest = bytes.as_mut_slice();
            let mut at = 0;
            for piece in &pieces {
                assert_eq!(piece.at, at);
                at += piece.bytes;
                let (own, others) = rest.split_at_mut(piece.bytes);
                plain.write(matrix, piece, own);
                rest = others;
            }
            assert!(rest.is_empty());
            for number in 0..matrix.outputs().next_multiple_of(16) {
                let is_there = number < matrix.outputs();
                let expected = if is_there { row(matrix, number) } else { vec![0.0; matrix.inputs()] };
                for (input, expected) in expected.iter().enumerate() {
                    let found = read(&bytes, matrix.dtype().into(), matrix.inputs(), number / 16, number % 16, input);
                    // Those that are not there may be -0.
                    let same = found.to_bits() == expected.to_bits() || (!is_there && found == 0.0);
                    assert!(same, "{what} {number} {input}: {found} {expected}");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn a_product_computes_every_row_with_every_matrix_once_in_one_launch_for_each_dtype(
        rows in 0usize..700,
        which in proptest::collection::vec(0usize..100, 1..=TOGETHER),
        spare in 0usize..5_000,
    ) {
        static PLAINS: LazyLock<Vec<Plain>> = LazyLock::new(|| swiglus().iter().map(|(_, swiglu)| Plain::of(&swiglu.gate_proj)).collect());
        let inputs = PLAINS[which[0] % PLAINS.len()].inputs;
        let alike: Vec<Plain> = PLAINS.iter().copied().filter(|plain| plain.inputs == inputs).collect();
        let matrices: Vec<(Plain, u64)> =
            which.iter().enumerate().map(|(number, which)| (alike[which % alike.len()], (number as u64 + 1) << 32)).collect();
        // What they were promised when they were taken in, and what others have asked for.
        let rooms = || matrices.iter().map(|(plain, _)| plain.room());
        let outputs: usize = matrices.iter().map(|(plain, _)| plain.outputs).sum();
        let room = (rooms().map(|room| room.0).max().unwrap(), 0, outputs.max(spare));
        prop_assert!(rooms().map(|room| room.2).max().unwrap() >= outputs, "a row of all of them fits");
        let mut next = vec![0; matrices.len()];
        for piece in product(&matrices, rows, room) {
            prop_assert!(piece.x <= room.0 && piece.inner == 0 && piece.y <= room.2);
            prop_assert_eq!((piece.parts.len(), piece.groups.len()), (matrices.len(), matrices.len()));
            let mut y = 0;
            for part in &piece.parts {
                prop_assert_eq!((part.rows.start, part.x, part.y), (next[part.job], 0, y));
                next[part.job] = part.rows.end;
                y += part.rows.len() * matrices[part.job].0.outputs;
            }
            prop_assert_eq!(piece.y, y);
            let classes: Vec<Class> = piece.launches.iter().map(|launch| launch.class).collect();
            prop_assert!(classes.is_sorted_by(|a, b| a < b), "each dtype once: {classes:?}");
            let mut first = 0;
            for launch in &piece.launches {
                prop_assert_eq!(launch.groups.start, first);
                first = launch.groups.end;
                let mut blocks = 0;
                for group in &piece.groups[launch.groups.clone()] {
                    let (plain, weights) = matrices[(group.down >> 32) as usize - 1];
                    let part = &piece.parts[(weights >> 32) as usize - 1];
                    prop_assert_eq!((group.inner, group.y, group.rows as usize), (0, part.y as u64, part.rows.len()));
                    prop_assert_eq!((group.hidden_size as usize, group.inner_size as usize), (plain.outputs, inputs.next_multiple_of(16)));
                    prop_assert_eq!((group.blocks_before_down, launch.class.many), (blocks, part.rows.len() > 2));
                    blocks += covered(group.rows, group.side, launch.class, plain.outputs.div_ceil(16));
                }
                prop_assert_eq!(launch.down_blocks, blocks);
            }
            prop_assert_eq!(first, piece.groups.len());
        }
        prop_assert!(next.iter().all(|next| *next == rows));
    }
}
