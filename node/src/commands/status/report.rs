//! What `hanse status` prints for people: no wider than 80 columns.

use std::fmt::Write as _;

use hanse_router::directory::ranges;

use super::{Document, LayerRow, PeerRow};
use crate::output;

/// Characters of a list of experts that are shown.
const LONGEST_LIST: usize = 34;
/// Characters of an address that are shown: any of IPv4 with its port.
const LONGEST_ADDRESS: usize = 21;

/// The whole report, without a line end at its end.
pub(super) fn report(document: &Document) -> String {
    let Some(model) = &document.model_id else {
        return "the network is reachable, but nobody hosts a model".to_owned();
    };
    if document.peers.is_empty() {
        return format!("model {model}\nnobody hosts it");
    }
    let experts: u64 = document.layers.iter().map(|row| u64::from(row.experts)).sum();
    let missing: usize = document.layers.iter().map(|row| row.missing.len()).sum();
    let mut text = format!("model {model}\n");
    let _ = write!(
        text,
        "{experts} experts in {}; {}\n\n",
        output::count(document.layers.len(), "layer"),
        output::count(document.peers.len(), "peer")
    );
    let _ = write!(text, "{}\n\n{}", layers(&document.layers), peers(&document.peers));
    if missing > 0 {
        let verb = if missing == 1 { "expert has" } else { "experts have" };
        let _ = write!(text, "\n\n{missing} {verb} no host: the model cannot be used until volunteers take them");
    } else if document.layers.iter().any(|row| row.min_replicas == 1) {
        let _ = write!(text, "\n\nsome experts have one host only: if it leaves, the model cannot be used");
    }
    // Tables fill their last column with spaces.
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// A row for layers that follow each other and are alike.
fn layers(rows: &[LayerRow]) -> comfy_table::Table {
    let mut table = output::table(&["layers", "experts", "replicas", "without a host"]);
    for alike in rows.chunk_by(|a, b| a.layer.checked_add(1) == Some(b.layer) && a.is_like(b)) {
        let (Some(first), Some(last)) = (alike.first(), alike.last()) else { continue };
        let layers =
            if first.layer == last.layer { first.layer.to_string() } else { format!("{}-{}", first.layer, last.layer) };
        let replicas = if first.min_replicas == first.max_replicas {
            first.min_replicas.to_string()
        } else {
            format!("{} to {}", first.min_replicas, first.max_replicas)
        };
        table.add_row([layers, first.experts.to_string(), replicas, list(&first.missing)]);
    }
    table
}

/// Numbers as ranges, cut where they are many.
fn list(numbers: &[u32]) -> String {
    let all = ranges(numbers);
    if all.len() <= LONGEST_LIST {
        return all;
    }
    // At a comma, so that no number is cut in two.
    let shown = all[..LONGEST_LIST].rfind(',').map_or("", |at| &all[..at]);
    format!("{shown},… ({} in all)", numbers.len())
}

fn peers(rows: &[PeerRow]) -> comfy_table::Table {
    let mut table = output::table(&["peer", "experts", "round trip", "load", "reach", "address"]);
    for row in rows {
        table.add_row([
            row.peer_id.parse().map_or_else(|_| row.peer_id.clone(), |id| output::short(&id)),
            row.experts.to_string(),
            row.round_trip_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms")),
            format!("{:.0} %", row.load * 100.0),
            row.reach.to_owned(),
            row.addresses.first().map_or_else(String::new, |address| ends(address)),
        ]);
    }
    table
}

/// An address, without its middle if it is long.
fn ends(address: &str) -> String {
    let characters: Vec<char> = address.chars().collect();
    if characters.len() <= LONGEST_ADDRESS {
        return address.to_owned();
    }
    let half = (LONGEST_ADDRESS - 1) / 2;
    let (head, tail) = (&characters[..half], &characters[characters.len() - half..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

#[cfg(test)]
mod tests {
    use hanse_protocol::Draining;

    use super::*;

    fn layer(layer: u32, missing: Vec<u32>, replicas: (usize, usize)) -> LayerRow {
        LayerRow { layer, experts: 256, missing, min_replicas: replicas.0, max_replicas: replicas.1 }
    }

    fn assert_fits(text: &str) {
        println!("{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?}");
        }
    }

    fn peer(address: &str) -> PeerRow {
        PeerRow {
            peer_id: hanse_protocol::PeerId::random().to_string(),
            addresses: vec![address.to_owned()],
            experts: 14_848,
            round_trip_ms: Some(1234.5),
            load: 1.0,
            reachability: "unreachable",
            draining: false,
            why_draining: None,
            reach: "unreachable",
            precision: hanse_protocol::Precision::Bf16,
            variant_of: None,
        }
    }

    #[test]
    fn a_large_network_reads_in_80_columns() {
        let odd: Vec<u32> = (0..256).filter(|expert| expert % 2 == 1).collect();
        let mut layers: Vec<LayerRow> = (3..61).map(|number| layer(number, Vec::new(), (1, 12))).collect();
        layers[40] = layer(43, odd, (0, 12));
        let peers = vec![peer("192.168.100.200:65535"), peer("[2001:db8:1111:2222:3333:4444:5555:6666]:65535")];
        let text = report(&Document { model_id: Some("c6".repeat(32)), layers, peers });
        assert_fits(&text);
        let rows: Vec<&str> = text.lines().filter(|line| line.contains(" 256 ")).collect();
        assert_eq!(rows.len(), 3, "{rows:?}");
        assert!(rows[0].contains("3-42") && rows[0].contains("1 to 12"), "{rows:?}");
        assert!(rows[1].contains("43") && rows[1].contains("1,3,5") && rows[1].contains("128 in all"), "{rows:?}");
        assert!(rows[2].contains("44-60"), "{rows:?}");
        assert!(text.contains("128 experts have no host"), "{text}");
        assert!(text.contains("192.168.100.200:65535") && text.contains("[2001:db8:…"), "{text}");
    }

    #[test]
    fn peers_of_all_kinds_are_told_apart_in_80_columns() {
        let circuit = format!(
            "/ip6/2001:db8:1111:2222:3333:4444:5555:6666/udp/65535/quic-v1/p2p/{}/p2p-circuit",
            hanse_protocol::PeerId::random()
        );
        let far = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535";
        let reaches = ["direct", "relayed", "unreachable"].into_iter().chain(Draining::ALL.map(Draining::short));
        let peers = reaches.flat_map(|reach| [far, &circuit].map(|address| PeerRow { reach, ..peer(address) }));
        let silent = PeerRow { addresses: Vec::new(), round_trip_ms: None, load: 0.0, ..peer("") };
        let peers: Vec<PeerRow> = peers.chain([silent]).collect();
        let document = Document { model_id: Some("c6".repeat(32)), layers: vec![layer(0, vec![], (1, 2))], peers };
        let text = report(&document);
        assert_fits(&text);
        for peer in &document.peers {
            let tail = &peer.peer_id[peer.peer_id.len() - 10..];
            let rows: Vec<&str> = text.lines().filter(|line| line.contains(tail)).collect();
            let [row] = rows[..] else { panic!("one row for {tail}: {rows:?}") };
            assert!(row.contains(peer.reach) && row.contains(" 14848 "), "{row}");
            assert!(row.contains(if peer.load > 0.0 { " 100 % " } else { " 0 % " }), "{row}");
            assert!(row.contains(if peer.round_trip_ms.is_some() { " 1234.5 ms " } else { " - " }), "{row}");
        }
    }

    #[test]
    fn a_list_of_experts_fits_80_columns_wherever_it_is_cut() {
        for (step, first) in (2..54).flat_map(|step| (0..step).map(move |first| (step, first))) {
            let missing = (0..1024).filter(|expert| expert % step != first).collect::<Vec<u32>>();
            let row = |number| LayerRow { experts: 1024, ..layer(number, missing.clone(), (0, 1200)) };
            let table = layers(&[row(100), row(101)]).to_string();
            table.lines().for_each(|line| assert_fits(line.trim_end()));
        }
    }

    #[test]
    fn a_model_that_nobody_hosts_is_named_in_80_columns() {
        let text = report(&Document { model_id: Some("c6".repeat(32)), layers: Vec::new(), peers: Vec::new() });
        assert_fits(&text);
        assert!(text.contains(&"c6".repeat(32)) && text.contains("nobody hosts it"), "{text}");
    }

    #[test]
    fn layers_that_do_not_follow_each_other_are_not_joined() {
        let table =
            layers(&[layer(0, vec![], (2, 2)), layer(2, vec![], (2, 2)), layer(3, vec![7], (0, 2))]).to_string();
        assert_eq!(table.lines().count(), 4, "{table}");
    }
}
