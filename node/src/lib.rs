//! The volunteer's side of Hanse: hold experts, serve them, announce them.
//!
//! [`Volunteer::start`] is all that a program needs; the binary `hanse` is made of the same parts.
//!
//! Inside: `store` holds the experts, `server` checks every frame, `batcher` joins the rows of all clients for one expert,
//! [`placement`] chooses experts for a given memory and moves them, [`experts_spec`] reads what a person wrote, [`owner`] keeps the
//! owner of the machine content. [`testnet`] runs volunteers as processes of this machine and makes trouble for them.

mod batcher;
mod counters;
pub mod experts_spec;
mod giving;
pub mod owner;
pub mod placement;
mod server;
pub mod simulation;
mod store;
pub mod testnet;
mod volunteer;

pub use counters::{Counters, Counts};
pub use experts_spec::{ExpertsSpec, ExpertsSpecError};
pub use store::{ExpertStore, Lent};
pub use volunteer::{
    ADVERT_INTERVAL, ADVERT_LIFETIME, Hosting, Moves, Preview, Volunteer, VolunteerConfig, VolunteerError, preview,
};
