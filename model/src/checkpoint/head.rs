//! The multi-token-prediction head that a checkpoint may carry: one decoder layer more, numbered after the model's, and what stands
//! around it. It is no part of the model: manifests do not list it, and nothing is missing where it is not there.

use std::sync::Arc;

use super::config::{self, Config};
use super::error::CheckpointError;
use super::{Checkpoint, Inner};
use crate::linear::Matrix;

/// Heads that a config may speak of.
const MOST: usize = 1024;

impl Checkpoint {
    /// Whether the checkpoint has a multi-token-prediction head of which nothing is missing, as far as names, shapes and dtypes say.
    ///
    /// # Errors
    /// `NoDraftHead` says what is missing; a tensor has a wrong shape or dtype.
    pub fn check_draft_head(&self) -> Result<(), CheckpointError> {
        self.with_draft_head().map(|_| ())
    }

    /// The same weights as a model whose last layer is that of the head, and this layer's number. Of several heads it is the first.
    pub(crate) fn with_draft_head(&self) -> Result<(Self, usize), CheckpointError> {
        let inner = &self.inner;
        let none = |reason: String| CheckpointError::NoDraftHead { reason };
        if !inner.family.tensors.draft_head {
            return Err(none(format!("models of family `{}` have none", inner.family.name)));
        }
        let map = config::parse(&inner.config_text)?;
        if Config::new(&map).whole("num_nextn_predict_layers", 0, MOST)?.unwrap_or(0) == 0 {
            return Err(none("config.json speaks of none (`num_nextn_predict_layers`)".to_owned()));
        }
        if inner.experts.is_some() {
            let reason =
                "it is no part of what members and hubs give out part by part: give a model folder that has it";
            return Err(none(reason.to_owned()));
        }
        let mut spec = inner.spec.clone();
        let layer = spec.layers.len();
        // As the implementations have it, the head's layer is one of those at the end of the model.
        spec.layers.extend(inner.spec.layers.last().cloned());
        let inner = Inner {
            dir: inner.dir.clone(),
            config_text: inner.config_text.clone(),
            spec,
            family: inner.family,
            tensors: inner.tensors.clone(),
            experts: None,
            head: Some(layer),
        };
        let mut tensors = inner.layer_tensors(layer);
        tensors.extend(inner.head_tensors(layer));
        tensors.extend(inner.spec.moe(layer).map(|moe| inner.layer_expert_shapes(layer, moe)).into_iter().flatten());
        tensors.iter().try_for_each(|(name, shape)| match inner.tensors.expect(name, shape) {
            Err(CheckpointError::MissingTensor { tensor }) => {
                Err(none(format!("tensor `{tensor}` is missing, as in folders that were written without it")))
            }
            other => other.map(|_| ()),
        })?;
        Ok((Self { inner: Arc::new(inner) }, layer))
    }

    /// A matrix `[outputs, inputs]` that a head may have, and otherwise shares with the model.
    pub(crate) fn own_matrix(
        &self,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<Option<Matrix>, CheckpointError> {
        self.inner.tensors.get(name).map(|_| self.matrix(name, outputs, inputs)).transpose()
    }
}

impl Inner {
    /// Names and shapes of what stands around the head's layer, those of them that a head may share with the model only if it has them.
    pub(super) fn head_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab) = (self.spec.hidden_size, self.spec.vocab_size);
        let own = |name: &str, shape: Vec<usize>| (Self::path(layer, &format!("{name}.weight")), shape);
        let mut tensors = vec![
            own("enorm", vec![hidden]),
            own("hnorm", vec![hidden]),
            own("eh_proj", vec![hidden, 2 * hidden]),
            own("shared_head.norm", vec![hidden]),
        ];
        let optional = [own("embed_tokens", vec![vocab, hidden]), own("shared_head.head", vec![vocab, hidden])];
        tensors.extend(optional.into_iter().filter(|(name, _)| self.tensors.get(name).is_some()));
        tensors
    }
}
