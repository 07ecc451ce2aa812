//! What a volunteer would host, without becoming one.

use std::sync::Arc;

use hanse_model::Checkpoint;
use hanse_protocol::discovery::{Discovery, DiscoveryConfig};
use hanse_protocol::{Identity, ModelId};
use hanse_router::client::layout_of;

use super::host::{LOOK_AROUND, SETTLE};
use super::neighbours::Neighbours;
use super::opener::{Opener, open_devices};
use super::shard::Shard;
use super::{Hosting, VolunteerConfig, VolunteerError};
use crate::placement::{View, choose};

/// A choice and what it was based on.
#[derive(Debug, Clone)]
pub struct Preview {
    /// The network without the one who asks.
    pub view: View,
    /// The experts that would be hosted, ascending.
    pub chosen: Vec<(u32, u32)>,
}

/// Looks at the network as a client, and chooses as [`Volunteer::start`](super::Volunteer::start) with the same arguments would.
///
/// # Errors
/// Nothing fits, the experts named are not in the model, or the control plane does not start.
pub async fn preview(
    identity: &Identity,
    checkpoint: &Checkpoint,
    model: ModelId,
    config: &VolunteerConfig,
) -> Result<Preview, VolunteerError> {
    let devices = open_devices(&Arc::new(Opener::new(config, checkpoint)), &config.device).await?;
    let shard = Shard::new(checkpoint.clone(), config.remote.clone(), devices, false);
    let joins = !config.bootstrap.is_empty() || config.mdns;
    let discovery = Discovery::start(
        identity,
        DiscoveryConfig {
            network: config.network.clone(),
            bootstrap: config.bootstrap.clone(),
            mdns: config.mdns,
            ..DiscoveryConfig::default()
        },
    )
    .await?;
    let mut neighbours = Neighbours::new(discovery.clone(), model);
    if joins && neighbours.wait_connected(LOOK_AROUND).await {
        neighbours.look(SETTLE).await;
    }
    discovery.shutdown().await;
    let view = neighbours.view_for_choice(shard.table(), &neighbours.loading());
    let budget_bytes = match &config.hosting {
        Hosting::Experts(_) => u64::MAX,
        Hosting::MemoryBytes(bytes) => shard.budget(*bytes).await?,
    };
    let chosen = match &config.hosting {
        Hosting::Experts(spec) => spec.resolve(&layout_of(checkpoint.spec()), checkpoint.spec().layers.len() as u32)?,
        Hosting::MemoryBytes(_) => choose(&view, &shard.at_hand()?, budget_bytes, neighbours.seed()),
    };
    match &config.hosting {
        Hosting::MemoryBytes(_) if chosen.is_empty() => {
            Err(VolunteerError::TooLittleMemory { budget_bytes, expert_bytes: shard.table().smallest() })
        }
        _ => Ok(Preview { view, chosen }),
    }
}
