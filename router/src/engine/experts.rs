//! The experts that one step calls, for as long as anybody wants its outcome.

use std::time::Duration;

use hanse_model::{Experts, ExpertsError, Routing};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::Step;
use crate::client::Place;
use crate::dispatch::Usage;
use crate::remote::Cancelled;

pub(super) struct StepExperts<'a> {
    pub(super) place: &'a Place,
    pub(super) runtime: &'a Handle,
    /// Those who read what the sequences of this step tell.
    pub(super) readers: Vec<mpsc::Sender<Step>>,
    /// How long to wait for experts that nobody hosts, if not as long as the network's configuration says.
    pub(super) patience: Option<Duration>,
    pub(super) usage: Usage,
}

impl Experts for StepExperts<'_> {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let network = match self.place {
            Place::Here(_) if self.readers.iter().all(mpsc::Sender::is_closed) => return Err(Cancelled.into()),
            Place::Here(local) => return local.clone().forward(layer, hidden, routing),
            Place::Network(network) => network,
        };
        let layer = u32::try_from(layer)?;
        let patience = self.patience.unwrap_or(network.config.replica_patience);
        let all_gone = async {
            for reader in &self.readers {
                reader.closed().await;
            }
        };
        self.runtime.block_on(async {
            tokio::select! {
                () = all_gone => Err(Cancelled.into()),
                output = network.forward_within(layer, hidden, routing, &mut self.usage, patience) => output.map_err(Into::into),
            }
        })
    }

    fn are_elsewhere(&self) -> bool {
        matches!(self.place, Place::Network(_))
    }
}
