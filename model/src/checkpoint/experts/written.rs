//! The tensors of experts in a folder that is written anew.

use super::{ExpertTensors, Swiglu};
use crate::checkpoint::Inner;
use crate::linear::Matrix;

/// A tensor of experts as it is written: matrices, one after another.
#[derive(Debug)]
pub(crate) struct WrittenTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) matrices: Vec<WrittenMatrix>,
}

/// One matrix of one expert of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenMatrix {
    pub(crate) expert: usize,
    which: Which,
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Gate,
    Up,
    Down,
}

impl WrittenMatrix {
    /// This one of those of its expert.
    pub(crate) fn of(self, swiglu: &Swiglu) -> &Matrix {
        match self.which {
            Which::Gate => &swiglu.gate_proj,
            Which::Up => &swiglu.up_proj,
            Which::Down => &swiglu.down_proj,
        }
    }
}

impl Inner {
    /// The tensors that a folder has for the experts of `layer`, as a folder that is written anew has them. `None` for families whose
    /// experts have more than three matrices.
    pub(in crate::checkpoint) fn written_experts(&self, layer: usize) -> Option<Vec<WrittenTensor>> {
        let moe = self.spec.moe(layer)?;
        let (hidden, width, experts) = (self.spec.hidden_size, moe.intermediate_size, moe.experts);
        let matrix = |expert, which| WrittenMatrix { expert, which };
        match self.expert_tensors(layer) {
            ExpertTensors::Split { prefix, gate_proj, up_proj, down_proj } => {
                let of = |expert| {
                    let tensor = |name: &str, shape: [usize; 2], which| WrittenTensor {
                        name: format!("{prefix}.{expert}.{name}.weight"),
                        shape: shape.to_vec(),
                        matrices: vec![matrix(expert, which)],
                    };
                    [
                        tensor(gate_proj, [width, hidden], Which::Gate),
                        tensor(up_proj, [width, hidden], Which::Up),
                        tensor(down_proj, [hidden, width], Which::Down),
                    ]
                };
                Some((0..experts).flat_map(of).collect())
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let both = (0..experts).flat_map(|expert| [matrix(expert, Which::Gate), matrix(expert, Which::Up)]);
                let down = (0..experts).map(|expert| matrix(expert, Which::Down));
                Some(vec![
                    WrittenTensor {
                        name: gate_up_proj,
                        shape: vec![experts, 2 * width, hidden],
                        matrices: both.collect(),
                    },
                    WrittenTensor { name: down_proj, shape: vec![experts, hidden, width], matrices: down.collect() },
                ])
            }
            ExpertTensors::Interleaved(_) => None,
        }
    }
}
