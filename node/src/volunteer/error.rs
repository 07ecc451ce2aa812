//! Why a volunteer does not start, or loses what it was to host.

use hanse_model::{DeviceError, LoadError, OpenError};
use hanse_protocol::discovery::DiscoveryError;
use hanse_protocol::{AdvertError, BindError, HostedError};
use hanse_router::weights::FetchError;

use crate::experts_spec::ExpertsSpecError;

/// Why a volunteer did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolunteerError {
    /// The control plane did not start.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The data plane did not start.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The experts wanted are not in the model.
    #[error(transparent)]
    Spec(#[from] ExpertsSpecError),
    /// Not even one expert fits.
    #[error("{budget_bytes} bytes hold no expert of this model: the smallest takes {expert_bytes} bytes")]
    TooLittleMemory {
        /// The memory given.
        budget_bytes: u64,
        /// The size of the model's smallest expert.
        expert_bytes: u64,
    },
    /// A device that was named cannot be used.
    #[error(transparent)]
    Device(#[from] OpenError),
    /// No device has room to compute.
    #[error("nothing can be computed: {0}")]
    Unusable(#[from] DeviceError),
    /// Not even one of the experts wanted fits onto the devices, or all of these failed.
    #[error("no expert fits on {devices}: see `hanse doctor` for what is free there")]
    NoRoom {
        /// Their names.
        devices: String,
    },
    /// An expert's weights cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Some experts that nobody gives, or a cache that cannot take them. Those that could be fetched are hosted.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The model has more layers or experts than an advert can say.
    #[error(transparent)]
    Hosted(#[from] HostedError),
    /// The advert cannot be made.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// Threads could not be started, or a task died.
    #[error("cannot start computing: {0}")]
    Compute(String),
}
