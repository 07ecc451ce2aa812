//! The network's experts behind the trait that the trunk calls.

use std::sync::{Arc, Mutex, PoisonError};

use hanse_model::{Experts, ExpertsError, Routing};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::dispatch::Usage;
use crate::network::ExpertNetwork;
use crate::stats::NetworkUse;

/// The request was cancelled while its experts were computed.
#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// [`Experts`] on the network, for one request: counts what the request uses.
///
/// The trunk is synchronous, so [`Experts::forward`] blocks its thread while peers compute. It must be called from a
/// thread outside the async runtime's workers, such as one of `spawn_blocking`.
#[derive(Debug)]
pub struct RemoteExperts {
    network: Arc<ExpertNetwork>,
    runtime: Handle,
    cancel: CancellationToken,
    usage: Arc<Mutex<Usage>>,
}

impl RemoteExperts {
    /// Experts of `network`, driven by `runtime`; calls in flight are dropped when `cancel` fires.
    #[must_use]
    pub fn new(network: Arc<ExpertNetwork>, runtime: Handle, cancel: CancellationToken) -> Self {
        Self { network, runtime, cancel, usage: Arc::default() }
    }

    /// What the request used so far.
    #[must_use]
    pub fn usage(&self) -> NetworkUse {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner).counts()
    }
}

impl Experts for RemoteExperts {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        let layer = u32::try_from(layer)?;
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        self.runtime.block_on(async {
            tokio::select! {
                () = self.cancel.cancelled() => Err(Cancelled.into()),
                output = self.network.forward(layer, hidden, routing, &mut usage) => output.map_err(Into::into),
            }
        })
    }

    fn are_elsewhere(&self) -> bool {
        true
    }
}
