//! What a layer of a trunk on a card asks of it, as the driver's stand-in counts it (`tests/cuda/emulated.sh`): launches and copies.
//!
//! In a process of its own, as the counts are the process's.

mod common;

use common::{Local, fixture};
use hanse_model::{DeviceChoice, LogitsWanted};

/// Launches, copies to the card, copies from it.
type Counts = [u64; 3];

fn counts() -> Counts {
    let path = std::env::var("HANSE_EMULATED_COUNTS").expect("HANSE_EMULATED_COUNTS says where the driver counts");
    let text = std::fs::read_to_string(path).unwrap();
    let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap());
    std::array::from_fn(|_| numbers.next().unwrap())
}

#[test]
#[ignore = "needs the emulated card"]
fn a_layer_takes_few_launches_and_a_copy_each_way_for_each_piece_of_work() {
    let card = DeviceChoice::Cuda(vec![0]).open_for_trunk().unwrap().unwrap();
    for (name, of_layer, of_dense) in [
        // q, k and v; o; the gate.
        ("mixtral", [3, 3, 3], [0; 3]),
        // The shared expert takes two launches.
        ("qwen2_moe", [5, 4, 4], [0; 3]),
        // q_a and kv_a; q_b; o; the gate; the shared expert. A dense layer has an MLP for the last two.
        ("deepseek_v3", [6, 5, 5], [5, 4, 4]),
    ] {
        let mut model = Local::open(&fixture(name));
        model.trunk.place(&card).unwrap();
        let spec = model.trunk.spec();
        let moe = spec.moe_layers().count() as u64;
        let dense = spec.layers.len() as u64 - moe;
        assert!(moe > 0 && (dense > 0) == (of_dense != [0; 3]), "{name}: {moe} and {dense} layers");
        let mut cache = model.trunk.new_cache();
        // Many rows and one take as many.
        for tokens in [&[1, 2, 3, 4, 5, 6, 7][..], &[8]] {
            for logits in [LogitsWanted::Last, LogitsWanted::None] {
                let before = counts();
                model.forward(tokens, &mut cache, logits);
                let after = counts();
                let head = u64::from(logits == LogitsWanted::Last);
                for kind in 0..3 {
                    let expected = moe * of_layer[kind] + dense * of_dense[kind] + head;
                    assert_eq!(after[kind] - before[kind], expected, "{name}, {} rows, kind {kind}", tokens.len());
                }
            }
        }
    }
}
