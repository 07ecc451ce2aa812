//! Keeps a volunteer's advert fresh.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hanse_model::{Checkpoint, StoredDtype};
use hanse_protocol::discovery::Discovery;
use hanse_protocol::discovery::keys::ProviderKey;
use hanse_protocol::{
    Advert, HostedExperts, Identity, MAX_CIRCUITS, MAX_DATA_ADDRESSES, ModelId, Precision, SignedAdvert, WireDtype,
};
use hanse_router::ExpertLayout;
use hanse_router::client::layout_of;
use tokio_util::sync::CancellationToken;

use super::VolunteerError;
use super::config::ip_of;
use super::shard::Shard;
use crate::server::Server;

/// An advert is believed this long after it was made.
pub const ADVERT_LIFETIME: Duration = Duration::from_secs(120);
/// A new advert is made this often: several within one life time.
pub const ADVERT_INTERVAL: Duration = Duration::from_secs(20);
/// While experts come and go, adverts follow each other no faster than this.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);
/// With more experts than this an advert does not say how wanted each is: it would be too long.
const MAX_POPULARITIES: usize = 1 << 18;

/// What was last said, and when.
#[derive(Debug)]
struct Said {
    at: Instant,
    experts: (HostedExperts, HostedExperts),
}

/// Where the data plane is.
#[derive(Debug)]
pub(super) struct DataAddresses {
    /// Where it listens.
    pub(super) bound: SocketAddr,
    /// Where others reach it, if the owner says so.
    pub(super) advertised: Vec<SocketAddr>,
}

/// What the checkpoint says of its experts for all to know.
#[derive(Debug)]
pub(super) struct Stored {
    layers: BTreeMap<u32, u32>,
    precision: Precision,
    variant_of: Option<ModelId>,
}

impl Stored {
    pub(super) fn of(checkpoint: &Checkpoint) -> Self {
        let spec = checkpoint.spec();
        let dtypes = (0..spec.layers.len()).flat_map(|layer| checkpoint.expert_dtypes(layer));
        Self {
            layers: layout_of(spec).layers,
            precision: dtypes.filter_map(precision_of).min().unwrap_or(Precision::F32),
            variant_of: checkpoint.original().and_then(|id| id.parse().ok()),
        }
    }
}

/// The precision of values that are stored so; `None` for scales.
fn precision_of(dtype: StoredDtype) -> Option<Precision> {
    Some(match dtype {
        StoredDtype::F32 => Precision::F32,
        StoredDtype::F16 => Precision::F16,
        StoredDtype::Bf16 => Precision::Bf16,
        StoredDtype::Q8_0 => Precision::Q8_0,
        StoredDtype::Q4K => Precision::Q4K,
        StoredDtype::F8E4m3 => Precision::Fp8,
        StoredDtype::F4E2m1 => Precision::Mxfp4,
        StoredDtype::F8E8m0 => return None,
    })
}

/// Makes the volunteer's adverts.
#[derive(Debug)]
pub(super) struct Announcer {
    pub(super) shard: Arc<Shard>,
    identity: Identity,
    discovery: Discovery,
    server: Arc<Server>,
    stored: Stored,
    pub(super) data: DataAddresses,
    said: Mutex<Said>,
}

impl Announcer {
    pub(super) fn new(
        identity: Identity,
        discovery: Discovery,
        server: Arc<Server>,
        shard: Arc<Shard>,
        stored: Stored,
        data: DataAddresses,
    ) -> Self {
        let said = Mutex::new(Said { at: Instant::now(), experts: Default::default() });
        Self { shard, identity, discovery, server, stored, data, said }
    }

    /// Announces again and again, sooner when something has changed, until cancelled.
    pub(super) async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let mut reach = self.discovery.reach();
        let mut addresses = self.discovery.watch_addresses();
        if self.data.advertised.is_empty()
            && let Err(error) = self.discovery.forward_data(self.data.bound).await
        {
            tracing::warn!(%error, "the router is not asked for the data plane's port");
        }
        loop {
            let outcome = tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(ADVERT_INTERVAL) => self.announce().await,
                Ok(()) = reach.changed() => self.announce().await,
                Ok(()) = addresses.changed() => self.announce().await,
                () = self.shard.changed() => {
                    let next = self.said().at + LEAST_INTERVAL;
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = tokio::time::sleep_until(next.into()) => self.announce_news().await,
                    }
                }
            };
            if let Err(error) = outcome {
                tracing::warn!(%error, "advert not renewed");
            }
        }
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model's experts.
    pub(super) fn layout(&self) -> ExpertLayout {
        let hidden_size = u32::try_from(self.server.store.hidden_size()).unwrap_or(u32::MAX);
        ExpertLayout { hidden_size, layers: self.stored.layers.clone() }
    }

    /// Whether new calls are refused at present.
    pub(super) fn refuses(&self) -> bool {
        self.server.draining.get().is_some()
    }

    /// What the owner says; else the bound address, or one address per network interface if it is bound to all, loopback last,
    /// since only members on this machine reach it.
    pub(super) fn data_addresses(&self) -> Vec<SocketAddr> {
        let DataAddresses { bound, advertised } = &self.data;
        if !advertised.is_empty() {
            return advertised.iter().copied().take(MAX_DATA_ADDRESSES).collect();
        }
        let reach = self.discovery.reach().borrow().clone();
        let mut ips = vec![bound.ip()];
        if bound.ip().is_unspecified() {
            let accepts = |ip: &IpAddr| ip.is_ipv4() || bound.is_ipv6();
            ips = self.discovery.addresses().iter().filter_map(ip_of).filter(accepts).collect();
            // Behind a router that leads to this machine, that router's address is not among its own.
            ips.extend(reach.public_ips.iter().filter(|ip| accepts(ip)));
            // Others try one after the other, and most are beyond the router.
            ips.sort_by_key(|ip| (ip.is_loopback(), !reach.public_ips.contains(ip), *ip));
            ips.dedup();
        }
        let own = ips.into_iter().map(|ip| SocketAddr::new(ip, bound.port()));
        let others = own.filter(|address| reach.data.is_none_or(|outer| outer.ip() != address.ip()));
        reach.data.into_iter().chain(others).take(MAX_DATA_ADDRESSES).collect()
    }

    async fn announce_news(&self) -> Result<(), VolunteerError> {
        if self.shard.announced()? == self.said().experts { Ok(()) } else { self.announce().await }
    }

    /// What is to be said now.
    pub(super) fn advert(&self) -> Result<Advert, VolunteerError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let batcher = &self.server.batcher;
        let reach = self.discovery.reach().borrow().clone();
        let load = batcher.queued_pairs().saturating_mul(1000) / batcher.max_pairs().max(1);
        let (hosted, loading) = self.shard.announced()?;
        let mut popularity = Vec::new();
        if hosted.count() <= MAX_POPULARITIES {
            popularity = self.server.demand.steps(&hosted, Instant::now());
        }
        Ok(Advert {
            model: self.server.model,
            hosted,
            layers: self.stored.layers.clone(),
            wire_dtypes: WireDtype::ALL.to_vec(),
            data_addresses: self.data_addresses(),
            capacity_rows: u32::try_from(batcher.max_pairs()).unwrap_or(u32::MAX),
            load_permille: load.min(1000) as u16,
            draining: self.server.draining.get(),
            // Rises also over a restart, as long as the clock does not go back.
            sequence: millis(now),
            expires_unix_ms: millis(now + ADVERT_LIFETIME),
            popularity,
            loading,
            reachability: reach.reachability,
            circuits: reach.circuits.into_iter().take(MAX_CIRCUITS).collect(),
            precision: self.stored.precision,
            variant_of: self.stored.variant_of,
        })
    }

    /// Says it.
    pub(super) async fn announce(&self) -> Result<(), VolunteerError> {
        let advert = self.advert()?;
        let mut keys = Vec::new();
        let models: Vec<ModelId> = [advert.model].into_iter().chain(advert.variant_of).collect();
        if advert.draining.is_none() {
            // Clients of the published model look there, and may accept it.
            keys = models.iter().flat_map(|model| ProviderKey::covering(*model, advert.hosted.layers())).collect();
            keys.push(ProviderKey::volunteers());
            if let Some(giving) = &self.server.giving {
                keys.push(ProviderKey::weights(advert.model));
                if giving.shelf().has_trunk() {
                    keys.push(ProviderKey::trunk(advert.model));
                }
            }
        }
        let signed = SignedAdvert::sign(&advert, &self.identity)?;
        *self.said() = Said { at: Instant::now(), experts: (advert.hosted, advert.loading) };
        self.discovery.announce(vec![(models, signed)], keys).await.map_err(|e| VolunteerError::Compute(e.to_string()))
    }
}
