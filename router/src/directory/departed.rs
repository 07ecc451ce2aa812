//! Peers that were lost a short time ago, for those who look on.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::PeerReport;

/// How long a lost peer is told of.
const REMEMBERED: Duration = Duration::from_secs(60);
/// The most lost peers that are remembered.
const MOST: usize = 256;

/// The latest peers that were lost, oldest first.
#[derive(Debug, Default)]
pub(super) struct Departed(Mutex<VecDeque<(Instant, PeerReport)>>);

impl Departed {
    /// Remembers a peer whose connection ended at `lost_at`, as it was then.
    pub(super) fn add(&self, lost_at: Instant, report: PeerReport) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(_, other)| other.peer != report.peer);
        if list.len() == MOST {
            list.pop_front();
        }
        list.push_back((lost_at, report));
    }

    /// Those that were lost no longer than a minute before `now`; the others are forgotten.
    pub(super) fn within_a_minute(&self, now: Instant) -> Vec<PeerReport> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(lost_at, _)| now.saturating_duration_since(*lost_at) < REMEMBERED);
        list.iter().map(|(_, report)| report.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hanse_protocol::discovery::Reachability;
    use hanse_protocol::{Advert, HostedExperts, Identity, ModelId, WireDtype};

    use super::*;
    use crate::directory::PeerState;
    use crate::stats::PeerStats;

    fn report() -> PeerReport {
        let advert = Advert {
            model: ModelId([0; 32]),
            hosted: HostedExperts::new(),
            layers: BTreeMap::new(),
            wire_dtypes: vec![WireDtype::F32],
            data_addresses: Vec::new(),
            capacity_rows: 1,
            load_permille: 0,
            draining: None,
            sequence: 1,
            expires_unix_ms: 0,
            popularity: Vec::new(),
            loading: HostedExperts::new(),
            reachability: Reachability::Direct,
            circuits: Vec::new(),
            precision: hanse_protocol::Precision::F32,
            variant_of: None,
        };
        let (peer, stats) = (Identity::generate().peer_id(), PeerStats::default());
        PeerReport { peer, state: PeerState::Lost, advert, address: None, round_trip: None, stats }
    }

    #[test]
    fn a_lost_peer_is_told_of_for_a_minute_and_once() {
        let (departed, now, report) = (Departed::default(), Instant::now(), report());
        departed.add(now, report.clone());
        departed.add(now + Duration::from_secs(1), report);
        assert_eq!(departed.within_a_minute(now + Duration::from_secs(60)).len(), 1);
        assert!(departed.within_a_minute(now + Duration::from_secs(61)).is_empty());
    }

    #[test]
    fn only_so_many_are_remembered() {
        let (departed, now) = (Departed::default(), Instant::now());
        (0..MOST + 10).for_each(|_| departed.add(now, report()));
        assert_eq!(departed.within_a_minute(now).len(), MOST);
    }
}
