//! One row of the table of peers.

use hanse_protocol::{HostedExperts, Path};

use super::{PeerView, millis};
use crate::directory::{PeerReport, ranges};

impl PeerView {
    pub(super) fn of(report: &PeerReport) -> Self {
        let (advert, stats) = (&report.advert, &report.stats);
        let path = report.address.as_ref().map(|path| match path {
            Path::Data(_) => "direct",
            Path::Control(_) => "hole-punched",
            Path::Relayed(_) => "relayed",
        });
        let announced = || advert.data_addresses.first().map(ToString::to_string);
        let is_called = stats.calls > 0;
        Self {
            peer_id: report.peer.to_string(),
            state: report.state,
            round_trip_ms: report.round_trip.map(millis),
            path,
            address: report.address.as_ref().map(ToString::to_string).or_else(announced),
            reachability: advert.reachability.to_string(),
            load: f64::from(advert.load_permille) / 1000.0,
            experts: advert.hosted.count(),
            loading: advert.loading.count(),
            hosted: hosted(&advert.hosted),
            precision: advert.wire_dtypes.iter().map(ToString::to_string).collect(),
            calls: stats.calls,
            rows: stats.rows,
            mean_ms: is_called.then(|| millis(stats.mean())),
            p99_ms: is_called.then(|| millis(stats.quantile(0.99))),
            failures: stats.failures,
        }
    }
}

/// Layers that follow each other and have the same experts are told together.
fn hosted(experts: &HostedExperts) -> Vec<(String, String)> {
    let mut groups: Vec<(Vec<u32>, String)> = Vec::new();
    for layer in experts.layers() {
        let own = ranges(&experts.in_layer(layer).collect::<Vec<_>>());
        match groups.last_mut() {
            Some((layers, same)) if *same == own => layers.push(layer),
            _ => groups.push((vec![layer], own)),
        }
    }
    groups.into_iter().map(|(layers, experts)| (ranges(&layers), experts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_the_same_experts_are_told_together() {
        let mut experts = HostedExperts::new();
        for (layer, expert) in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 7), (5, 7)] {
            experts.insert(layer, expert).unwrap();
        }
        let text = |layers: &str, experts: &str| (layers.to_owned(), experts.to_owned());
        assert_eq!(hosted(&experts), [text("1-2", "0-1"), text("3,5", "7")]);
    }
}
