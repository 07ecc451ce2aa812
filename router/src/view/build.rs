//! The map of experts, from what peers say of themselves.

use hanse_protocol::rows_per_minute;

use super::LayerView;
use crate::directory::{ExpertLayout, PeerReport, PeerState};

/// The layers with their experts' replicas and demand by `reports`, and with this client's own `calls` of a layer.
pub(super) fn layers(layout: &ExpertLayout, reports: &[PeerReport], calls: impl Fn(u32) -> Vec<u64>) -> Vec<LayerView> {
    let empty = |(&layer, &experts): (&u32, &u32)| LayerView {
        layer,
        experts,
        replicas: vec![0; experts as usize],
        calls: calls(layer),
        demand: vec![0; experts as usize],
    };
    let mut layers: Vec<LayerView> = layout.layers.iter().map(empty).collect();
    for report in reports.iter().filter(|report| report.state == PeerState::Connected) {
        // In the order of the hosted experts, or empty.
        let mut popularity = report.advert.popularity.iter();
        for (layer, expert) in report.advert.hosted.iter() {
            let rows = popularity.next().map_or(0.0, |&step| rows_per_minute(step));
            let Ok(at) = layers.binary_search_by_key(&layer, |view| view.layer) else { continue };
            let view = &mut layers[at];
            // Strangers' adverts are held against their own number of experts, not against ours.
            if let (Some(replicas), Some(demand)) =
                (view.replicas.get_mut(expert as usize), view.demand.get_mut(expert as usize))
            {
                *replicas += 1;
                *demand = demand.saturating_add(rows.round() as u64);
            }
        }
    }
    layers
}
