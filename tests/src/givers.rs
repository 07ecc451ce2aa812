//! Volunteers that give out the bundled model, and members that know nothing but its id.

use std::path::Path;
use std::sync::Arc;

use hanse_model::Checkpoint;
use hanse_node::{Hosting, Volunteer, VolunteerConfig};
use hanse_protocol::{Identity, ModelId, Multiaddr, SignedManifest};
use hanse_router::NetworkConfig;
use hanse_router::weights::{Cache, RemoteModel, Shelf, describe};

use crate::net::{PACE, PATIENCE};
use crate::reference::tiny_moe;

/// A volunteer with the bundled model's folder that hosts `experts` and gives out everything.
pub async fn founder(experts: &str) -> (Volunteer, ModelId) {
    founder_of(&tiny_moe(), experts).await
}

/// The same with another folder.
pub async fn founder_of(dir: &Path, experts: &str) -> (Volunteer, ModelId) {
    member_of(dir, Hosting::Experts(experts.parse().unwrap()), Vec::new()).await
}

/// The same as [`founder`], with others to join.
pub async fn member(hosting: Hosting, bootstrap: Vec<Multiaddr>) -> (Volunteer, ModelId) {
    member_of(&tiny_moe(), hosting, bootstrap).await
}

async fn member_of(dir: &Path, hosting: Hosting, bootstrap: Vec<Multiaddr>) -> (Volunteer, ModelId) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let described = describe(&checkpoint, &mut |_, _| {}).unwrap();
    let signed = SignedManifest::sign(described.manifest, &Identity::generate()).unwrap();
    let shelf = Shelf::of_folder(signed.clone(), &described.locations, dir).unwrap();
    let shelf = Some(Arc::new(shelf));
    let config = VolunteerConfig { hosting, bootstrap, threads: 1, pace: PACE, shelf, ..VolunteerConfig::default() };
    let identity = Identity::generate();
    (Volunteer::start(&identity, &checkpoint, signed.id(), config, |_, _| ()).await.unwrap(), signed.id())
}

/// How a member joins through a volunteer.
#[must_use]
pub fn joins(volunteer: &Volunteer) -> NetworkConfig {
    let bootstrap = vec![volunteer.addresses()[0].clone()];
    NetworkConfig { bootstrap, join_timeout: PATIENCE, ..NetworkConfig::default() }
}

/// The model as one knows it who has nothing but its id; what is fetched lies in `dir`.
pub async fn find(model: ModelId, dir: &Path, network: &NetworkConfig) -> RemoteModel {
    RemoteModel::find(model, Cache::new(dir, u64::MAX).unwrap(), network, &[]).await.unwrap()
}

/// A volunteer of a model that is not here; it gives out what it has fetched. It may still be loading.
pub async fn newcomer(model: &RemoteModel, network: &NetworkConfig, hosting: Hosting) -> Volunteer {
    let shelf = Shelf::of_cache(model.manifest().clone(), model.fetcher().cache().clone());
    let config = VolunteerConfig {
        bootstrap: network.bootstrap.clone(),
        hosting,
        threads: 1,
        pace: PACE,
        remote: Some(model.clone()),
        shelf: Some(Arc::new(shelf)),
        ..VolunteerConfig::default()
    };
    Volunteer::join(&Identity::generate(), model.checkpoint(), model.id(), config, |_, _| ()).await.unwrap()
}

/// Room for so many experts of the bundled model.
#[must_use]
pub fn room_for(experts: u64) -> Hosting {
    Hosting::MemoryBytes(experts * Checkpoint::open(&tiny_moe()).unwrap().sizes().bytes_per_expert[0])
}
