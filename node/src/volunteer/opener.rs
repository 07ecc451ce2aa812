//! Opens what computes: at the start, and again when a device that was lent comes back.

use std::sync::Arc;

use hanse_model::{Checkpoint, Device, DeviceChoice, MoeSpec, compute_pool};

use super::{VolunteerConfig, VolunteerError};

/// Opens devices that can compute a model's experts.
#[derive(Debug)]
pub(super) struct Opener {
    hidden_size: usize,
    /// The different blocks of experts that the model has.
    blocks: Vec<MoeSpec>,
    threads: usize,
}

impl Opener {
    pub(super) fn new(config: &VolunteerConfig, checkpoint: &Checkpoint) -> Self {
        let spec = checkpoint.spec();
        let mut blocks: Vec<MoeSpec> = spec.moe_layers().map(|(_, moe)| moe.clone()).collect();
        blocks.dedup();
        Self { hidden_size: spec.hidden_size, blocks, threads: config.threads }
    }

    /// Opens the devices; a card takes a while. Those that have no room to compute this model's experts are left out.
    pub(super) fn open(&self, choice: &DeviceChoice) -> Result<Vec<Arc<dyn Device>>, VolunteerError> {
        let pool = compute_pool(self.threads).map_err(|e| VolunteerError::Compute(e.to_string()))?;
        let (mut usable, mut unusable) = (Vec::new(), None);
        let pool = Arc::new(pool);
        for device in choice.open(pool.clone())? {
            let prepare = |moe: &MoeSpec| device.prepare(self.hidden_size, moe);
            match self.blocks.iter().try_for_each(prepare) {
                Ok(()) => usable.push(device),
                Err(error) => {
                    tracing::warn!(%error, "a device is left out");
                    unusable = Some(error);
                }
            }
        }
        match unusable {
            Some(_) if usable.is_empty() && *choice == DeviceChoice::Auto => {
                tracing::warn!("computing on the processor");
                Ok(DeviceChoice::Cpu.open(pool)?)
            }
            Some(error) if usable.is_empty() => Err(error.into()),
            _ => Ok(usable),
        }
    }
}

/// Opens the devices of a volunteer, in a thread for that.
pub(super) async fn open_devices(
    opener: &Arc<Opener>,
    choice: &DeviceChoice,
) -> Result<Vec<Arc<dyn Device>>, VolunteerError> {
    let (opener, choice) = (opener.clone(), choice.clone());
    let opening = tokio::task::spawn_blocking(move || opener.open(&choice));
    opening.await.map_err(|e| VolunteerError::Compute(e.to_string()))?
}
