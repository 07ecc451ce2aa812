//! One forward pass now and then, written down call by call: where its time went.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hanse_protocol::PeerId;
use serde::{Serialize, Serializer};

/// A pass is written down at most this often: the price is a few small allocations.
const INTERVAL: Duration = Duration::from_millis(250);
/// The most calls of a layer that are written down.
const MAX_CALLS: usize = 256;

/// One forward pass through the MoE layers of a model, as the client saw it. Starts count from the beginning of the first MoE layer.
/// What lies between two layers is the trunk's time. Serialized with times as milliseconds: `total_ms` and so on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PassTrace {
    /// From the first MoE layer's beginning to the last one's end.
    #[serde(rename = "total_ms", serialize_with = "as_millis")]
    pub total: Duration,
    /// Rows (tokens of all sequences) that advanced together.
    pub rows: usize,
    /// The MoE layers in order.
    pub layers: Vec<LayerTrace>,
}

/// The routed experts of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerTrace {
    /// The layer's number.
    pub layer: u32,
    /// When it began.
    #[serde(rename = "start_ms", serialize_with = "as_millis")]
    pub start: Duration,
    /// Until the last answer that it needed.
    #[serde(rename = "ms", serialize_with = "as_millis")]
    pub duration: Duration,
    /// What was asked of whom.
    pub calls: Vec<CallTrace>,
}

/// One frame to a peer and its answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CallTrace {
    /// Who was asked.
    #[serde(rename = "peer_id", serialize_with = "as_text")]
    pub peer: PeerId,
    /// When it was sent.
    #[serde(rename = "start_ms", serialize_with = "as_millis")]
    pub start: Duration,
    /// Until its answer, its failure, or the end of the layer if another peer's answer made it superfluous.
    #[serde(rename = "ms", serialize_with = "as_millis")]
    pub duration: Duration,
    /// Of which the peer computed, by its own account; `None` without an answer.
    #[serde(rename = "compute_ms", serialize_with = "as_optional_millis")]
    pub compute: Option<Duration>,
    /// Rows that it carried.
    pub rows: usize,
    /// Different experts that it asked for.
    pub experts: usize,
    /// Sent because another call was slow.
    pub hedged: bool,
    /// Sent because another call failed.
    pub retried: bool,
}

fn as_text<S: Serializer>(peer: &PeerId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(peer)
}

/// To a microsecond: more digits say nothing.
fn as_millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_micros() as f64 / 1e3)
}

fn as_optional_millis<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => as_millis(duration, serializer),
        None => serializer.serialize_none(),
    }
}

/// Why a call was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    First,
    Retry,
    Hedge,
}

/// A pass that is being written down.
#[derive(Debug)]
pub(crate) struct Recording {
    started: Instant,
    trace: PassTrace,
    /// The piece of the layer that each call of the open layer belongs to, while it is not answered.
    open: Vec<Option<usize>>,
}

impl Recording {
    fn new(started: Instant) -> Self {
        Self { started, trace: PassTrace { total: Duration::ZERO, rows: 0, layers: Vec::new() }, open: Vec::new() }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn begin_layer(&mut self, layer: u32, rows: usize) {
        let start = self.now();
        self.trace.rows = self.trace.rows.max(rows);
        self.trace.layers.push(LayerTrace { layer, start, duration: Duration::ZERO, calls: Vec::new() });
        self.open.clear();
    }

    pub(super) fn sent(&mut self, piece: usize, peer: PeerId, rows: usize, experts: usize, reason: Reason) {
        let start = self.now();
        let Some(layer) = self.trace.layers.last_mut().filter(|layer| layer.calls.len() < MAX_CALLS) else { return };
        let (hedged, retried) = (reason == Reason::Hedge, reason == Reason::Retry);
        layer.calls.push(CallTrace {
            peer,
            start,
            duration: Duration::ZERO,
            compute: None,
            rows,
            experts,
            hedged,
            retried,
        });
        self.open.push(Some(piece));
    }

    /// The call of `piece` came to its end: with an answer that took the peer `compute`, or without.
    pub(super) fn ended(&mut self, piece: usize, compute: Option<Duration>) {
        let now = self.now();
        let Some(at) = self.open.iter().position(|open| *open == Some(piece)) else { return };
        self.open[at] = None;
        if let Some(call) = self.trace.layers.last_mut().and_then(|layer| layer.calls.get_mut(at)) {
            (call.duration, call.compute) = (now.saturating_sub(call.start), compute);
        }
    }

    /// The rows of the layer that were in flight are all there; there may be more of them in another frame.
    pub(super) fn end_calls(&mut self) {
        let now = self.now();
        let Some(layer) = self.trace.layers.last_mut() else { return };
        for (call, open) in layer.calls.iter_mut().zip(&mut self.open) {
            if open.take().is_some() {
                call.duration = now.saturating_sub(call.start);
            }
        }
        layer.duration = now.saturating_sub(layer.start);
        self.trace.total = now;
    }
}

/// Decides which passes are written down, and keeps the latest.
#[derive(Debug)]
pub(crate) struct Tracer {
    epoch: Instant,
    /// When the next one may be, in milliseconds since the epoch.
    next_ms: AtomicU64,
    latest: Mutex<Option<(Instant, PassTrace)>>,
}

impl Default for Tracer {
    fn default() -> Self {
        Self { epoch: Instant::now(), next_ms: AtomicU64::new(0), latest: Mutex::default() }
    }
}

impl Tracer {
    /// A recording of the pass that begins now, if it is time for one.
    pub(super) fn begin(&self) -> Option<Recording> {
        let now = Instant::now();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now_ms = millis(now.saturating_duration_since(self.epoch));
        let next = self.next_ms.load(Ordering::Relaxed);
        let later = now_ms + millis(INTERVAL);
        let is_due =
            now_ms >= next && self.next_ms.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        is_due.then(|| Recording::new(now))
    }

    pub(super) fn finish(&self, recording: Recording) {
        let latest = Some((recording.started, recording.trace));
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = latest;
    }

    /// The latest pass that was written down, and when it began.
    pub(crate) fn latest(&self) -> Option<(Instant, PassTrace)> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use hanse_protocol::Identity;

    use super::*;

    #[test]
    fn a_trace_tells_answers_from_calls_that_were_not_needed_any_more() {
        let tracer = Tracer::default();
        let mut recording = tracer.begin().unwrap();
        let [slow, quick] = [0; 2].map(|_| Identity::generate().peer_id());
        recording.begin_layer(3, 2);
        recording.sent(1, slow, 2, 4, Reason::First);
        recording.sent(2, quick, 2, 4, Reason::Hedge);
        recording.ended(2, Some(Duration::from_micros(500)));
        recording.ended(7, None);
        recording.end_calls();
        tracer.finish(recording);
        let (_, trace) = tracer.latest().unwrap();
        let [layer] = trace.layers.as_slice() else { panic!("{trace:?}") };
        assert_eq!((layer.layer, trace.rows), (3, 2));
        assert_eq!(
            layer.calls.iter().map(|call| call.compute).collect::<Vec<_>>(),
            [None, Some(Duration::from_micros(500))]
        );
        assert!(layer.calls[0].duration >= layer.calls[1].duration && layer.duration <= trace.total);
        let call = &serde_json::to_value(&trace).unwrap()["layers"][0]["calls"][1];
        assert_eq!((&call["peer_id"], &call["compute_ms"]), (&quick.to_string().into(), &0.5.into()));
    }

    #[test]
    fn not_every_pass_is_written_down() {
        let tracer = Tracer::default();
        assert!(tracer.begin().is_some());
        assert!(tracer.begin().is_none());
    }
}
