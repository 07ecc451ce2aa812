//! The law of the design, term by term: pure, times in milliseconds.
//!
//! `time per decode step = trunk + sum over MoE layers of (round trip + serve)`. The terms are measured apart from what is predicted:
//! the trunk by generations in one process, round trip and serving of a layer by calls of the same rows over a path without delay, to
//! which the round trip of the path is added. Nothing is fitted.

use std::collections::BTreeSet;

/// A peer may keep an acknowledgement back for so long (`protocol/src/transport/settings.rs`), so the sender adds it to its patience.
const MAX_ACK_DELAY_MS: f64 = 5.0;
/// The least that is added to the round trip for its variation (RFC 9002, section 6.1.2).
const GRANULARITY_MS: f64 = 1.0;
/// A packet is lost when a later one is acknowledged and so many round trips have passed since it was sent (RFC 9002, section 6.1.2).
const TIME_THRESHOLD: f64 = 9.0 / 8.0;
/// Bytes of a frame that every call has: prefix and header without its experts (`docs/protocol.md`).
const CALL_BYTES: usize = 16 + 66;
/// The same of an answer: prefix and header.
const ANSWER_BYTES: usize = 16 + 29;
/// Of each expert in a call: its number and two counts.
const EXPERT_BYTES: usize = 4 + 8 + 8;
/// Of each row of an expert: its number and its weight.
const ASSIGNMENT_BYTES: usize = 4 + 4;

/// A decode step, or a pass over a prompt: everything but the experts, the layers over a path without delay, and a round trip for each.
pub(super) fn step(trunk_ms: f64, served_ms: f64, layers: usize, round_trip_ms: f64) -> f64 {
    trunk_ms + served_ms + layers as f64 * round_trip_ms
}

/// How many of a row's `experts` each peer is asked for that is asked at all: as few peers as host them together, taken greedily. `hosts`
/// are the (layer, expert) pairs of each peer.
pub(super) fn split(layer: u32, experts: &[u32], hosts: &[BTreeSet<(u32, u32)>]) -> Vec<usize> {
    let mut open = experts.to_vec();
    let mut shares = Vec::new();
    while !open.is_empty() {
        let covered =
            |held: &BTreeSet<(u32, u32)>| open.iter().filter(|&&expert| held.contains(&(layer, expert))).count();
        let Some(best) = hosts.iter().max_by_key(|held| covered(held)).filter(|held| covered(held) > 0) else { break };
        shares.push(covered(best));
        open.retain(|&expert| !best.contains(&(layer, expert)));
    }
    shares
}

/// How an answer looks on the wire.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Of one row.
    pub(super) bytes: usize,
    /// Whether the client adds the experts' rows up: then there is one for each expert, otherwise one for each row.
    pub(super) client_adds: bool,
}

/// Bytes of the frames that a pass of one row sends and receives in a layer whose work is shared as [`split`] says, and how many of them
/// are counted as those of hidden states and assignments.
pub(super) fn layer_bytes(shares: &[usize], rows: Rows) -> (usize, usize) {
    let counted = |&experts: &usize| {
        let answers = if rows.client_adds { experts } else { 1 };
        rows.bytes + experts * (EXPERT_BYTES - 8 + ASSIGNMENT_BYTES) + answers * rows.bytes
    };
    let counted: usize = shares.iter().map(counted).sum();
    let experts: usize = shares.iter().sum();
    (counted + experts * 8 + shares.len() * (CALL_BYTES + ANSWER_BYTES), counted)
}

/// A time that is not always the same: what it may be and how probable that is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chance(Vec<(f64, f64)>);

impl Chance {
    /// Always nothing.
    pub(super) fn none() -> Self {
        Self(vec![(1.0, 0.0)])
    }

    fn combined(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        let pairs = self.0.iter().flat_map(|a| other.0.iter().map(move |b| (a, b)));
        Self(pairs.map(|((p, a), (q, b))| (p * q, combine(*a, *b))).collect())
    }

    /// One after the other.
    pub(super) fn then(&self, other: &Self) -> Self {
        self.combined(other, |a, b| a + b)
    }

    /// At the same time, until the later one.
    pub(super) fn beside(&self, other: &Self) -> Self {
        self.combined(other, f64::max)
    }

    /// How probable it is that it takes longer than `least`.
    pub(super) fn over(&self, least: f64) -> f64 {
        self.0.iter().filter(|(_, value)| *value > least).map(|(p, _)| p).sum()
    }

    pub(super) fn mean(&self) -> f64 {
        self.0.iter().map(|(p, value)| p * value).sum()
    }
}

/// A path that loses packets, each with the same chance.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path {
    pub(super) round_trip_ms: f64,
    /// 0 to 1, in each direction.
    pub(super) loss: f64,
}

impl Path {
    /// When the last packet of a message is lost, nothing later is acknowledged: the sender waits for its probe timeout, sends a ping, and
    /// sends the data again when the ping was acknowledged, a round trip later. (RFC 9002 would have the probe carry the data; quinn
    /// 0.11 sends stream data again only when it is known to be lost.)
    pub(super) fn tail_ms(self) -> f64 {
        let probe_timeout = self.round_trip_ms + GRANULARITY_MS + MAX_ACK_DELAY_MS;
        probe_timeout + self.round_trip_ms
    }

    /// What loss adds to a message of so many packets; of what is sent again only the next loss is counted.
    fn message(self, packets: usize) -> Chance {
        let lost = self.loss;
        // The acknowledgement of the last packet tells of those before it.
        let gap = (1.0 - lost) * (1.0 - (1.0 - lost).powi(packets as i32 - 1));
        let none = 1.0 - lost - gap;
        let first = Chance(vec![(none, 0.0), (gap, self.round_trip_ms * TIME_THRESHOLD), (lost, self.tail_ms())]);
        let again = (1.0 - none) * lost;
        first.then(&Chance(vec![(1.0 - again, 0.0), (again, self.tail_ms())]))
    }

    /// What loss adds to a call and its answer.
    pub(super) fn call(self, sent_packets: usize, received_packets: usize) -> Chance {
        self.message(sent_packets).then(&self.message(received_packets))
    }
}

/// Packets of a message of so many bytes.
pub(super) fn packets(bytes: usize, payload: usize) -> usize {
    bytes.div_ceil(payload).max(1)
}

/// The line through two points, at `x`.
pub(super) fn line(from: (f64, f64), to: (f64, f64), x: f64) -> f64 {
    from.1 + (to.1 - from.1) * (x - from.0) / (to.0 - from.0)
}

/// Bytes of a frame that asks for `experts` experts of one row, and of its answer, if the client adds up.
pub(super) fn call_bytes(experts: usize, row_bytes: usize) -> (usize, usize) {
    let sent = CALL_BYTES + row_bytes + experts * (EXPERT_BYTES + ASSIGNMENT_BYTES);
    (sent, ANSWER_BYTES + experts * row_bytes)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hanse_protocol::{Combine, ExpertAnswer, ExpertCall, ExpertRows, Frame, ModelId, WireDtype, write_frame};

    use super::*;

    fn hosts(peers: &[&[u32]]) -> Vec<BTreeSet<(u32, u32)>> {
        peers.iter().map(|experts| experts.iter().map(|&expert| (0, expert)).collect()).collect()
    }

    #[test]
    fn a_step_waits_for_one_round_trip_in_each_layer() {
        assert_eq!(step(1.0, 3.0, 6, 0.0), 4.0);
        assert_eq!(step(1.0, 3.0, 6, 20.0), 124.0);
    }

    #[test]
    fn as_few_peers_are_asked_as_host_the_experts() {
        let net = hosts(&[&[0, 1], &[2, 3], &[1, 2]]);
        assert_eq!(split(0, &[0, 1], &net), [2]);
        assert_eq!(split(0, &[1, 2], &net), [2], "the third hosts both");
        assert_eq!(split(0, &[0, 3], &net), [1, 1]);
        assert!(split(1, &[0], &net).is_empty(), "another layer");
    }

    #[tokio::test]
    async fn frames_are_as_long_as_predicted() {
        for (experts, wire) in [(1u32, WireDtype::F32), (2, WireDtype::F16), (3, WireDtype::F32)] {
            let row = wire.row_bytes(192);
            let body = Bytes::from(vec![0; row]);
            let assigned = |expert| ExpertRows { expert, rows: vec![0], weights: vec![0.5] };
            let call = ExpertCall {
                request_id: 1,
                model: ModelId([0; 32]),
                layer: 0,
                hidden_size: 192,
                rows: 1,
                dtype: wire,
                combine: Combine::Client,
                deadline_ms: 1,
                assignments: (0..experts).map(assigned).collect(),
                body: body.clone(),
            };
            let answer = ExpertAnswer {
                request_id: 1,
                dtype: wire,
                rows: experts,
                hidden_size: 192,
                queue_us: 0,
                compute_us: 0,
                queued_rows: 0,
                body: Bytes::from(vec![0; row * experts as usize]),
            };
            let (mut sent, mut received) = (Vec::new(), Vec::new());
            write_frame(&mut sent, &Frame::Call(call)).await.unwrap();
            write_frame(&mut received, &Frame::Answer(answer)).await.unwrap();
            assert_eq!(call_bytes(experts as usize, row), (sent.len(), received.len()), "{experts} experts");
            let (all, _) = layer_bytes(&[experts as usize], Rows { bytes: row, client_adds: true });
            assert_eq!(all, sent.len() + received.len());
        }
    }

    #[test]
    fn peers_that_add_up_answer_one_row_for_all_of_their_experts() {
        let rows = |client_adds| Rows { bytes: 100, client_adds };
        let (all, counted) = layer_bytes(&[2], rows(true));
        let (summed, counted_summed) = layer_bytes(&[2], rows(false));
        assert_eq!((all - summed, counted - counted_summed), (100, 100));
    }

    #[test]
    fn loss_costs_nothing_without_loss_and_a_probe_and_a_round_trip_at_the_end_of_a_message() {
        let path = |loss| Path { round_trip_ms: 20.0, loss };
        assert_eq!(path(0.0).call(1, 2).mean(), 0.0);
        // One packet each way: 2 % of 20 + 1 + 5 + 20 ms, and next to nothing for what is lost twice.
        let mean = path(0.01).call(1, 1).mean();
        assert!((mean - 0.02 * 46.0).abs() < 0.02, "{mean}");
        // A first packet of two is told by the second.
        let gap = path(0.01).call(1, 2).mean() - mean;
        assert!((gap - 0.01 * 22.5).abs() < 0.02, "{gap}");
    }

    #[test]
    fn a_layer_waits_for_the_latest_call() {
        let call = Chance(vec![(0.75, 0.0), (0.25, 8.0)]);
        assert_eq!(call.beside(&call).mean(), 8.0 * (1.0 - 0.75 * 0.75));
        assert_eq!(call.then(&call).mean(), 4.0);
        assert_eq!([call.over(7.0), call.over(8.0), call.beside(&call).over(1.0)], [0.25, 0.0, 0.4375]);
        assert_eq!(call.beside(&Chance::none()), Chance(vec![(0.75, 0.0), (0.25, 8.0)]));
    }

    #[test]
    fn a_line_goes_through_both_points() {
        assert_eq!([10.0, 20.0, 15.0, 30.0].map(|x| line((10.0, 1.0), (20.0, 3.0), x)), [1.0, 3.0, 2.0, 5.0]);
    }
}
