//! One layer over the network: group by peer, call all peers at once, retry and hedge, add up.

mod combine;
mod hedge;
mod pieces;
mod tally;
mod trace;

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hanse_model::Routing;
use hanse_protocol::{
    CallError, Combine, ExpertCall, ExpertRows, Frame, FrameLimits, ModelId, PeerId, Precision, RefusalCode,
};

use crate::network::ExpertNetwork;
use crate::stats::{AnsweredCall, NetworkUse};
pub(crate) use combine::add_answers;
pub(crate) use hedge::HedgeBudget;
use pieces::Layer;
pub(crate) use tally::Tally;
use trace::Recording;
pub(crate) use trace::Tracer;
pub use trace::{CallTrace, LayerTrace, PassTrace};

/// Why a layer could not be computed by the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DispatchError {
    /// No connected peer hosts these experts, and none came in time. Try again when volunteers are back.
    #[error("no peer hosts these experts of layer {layer}: {}{}", crate::directory::ranges(.experts), reason_text(.reason))]
    NoReplica {
        /// The layer.
        layer: u32,
        /// The experts, ascending.
        experts: Vec<u32>,
        /// What the last peer that was asked for one of them said, if any was.
        reason: Option<String>,
    },
    /// Computing the client's own experts failed; this is a defect.
    #[error("cannot compute the experts that are held here: {0}")]
    Resident(String),
    /// The caller's rows, routing or layer do not fit the model. The caller's fault.
    #[error("{0}")]
    Invalid(String),
}

fn reason_text(reason: &Option<String>) -> String {
    reason.as_ref().map(|r| format!(" (the last one asked: {r})")).unwrap_or_default()
}

/// What a request keeps count of while it runs.
#[derive(Debug, Default)]
pub struct Usage {
    pub(crate) counts: NetworkUse,
    pub(crate) answered_by: BTreeSet<PeerId>,
    /// How each expert was stored that was computed by peers, the first time and the last; empty where only the published form is accepted.
    forms: HashMap<(u32, u32), [Precision; 2]>,
    /// The pass in progress, if it is one of those that are written down.
    recording: Option<Recording>,
}

impl Usage {
    /// Counts what another one has counted, too.
    pub(crate) fn add(&mut self, other: &Self) {
        self.counts.add(&other.counts);
        self.answered_by.extend(&other.answered_by);
        for (&expert, &theirs) in &other.forms {
            self.went_on(expert, theirs);
        }
    }

    /// Notes how an expert was stored that was computed.
    fn note_form(&mut self, layer: u32, expert: u32, precision: Precision) {
        self.counts.precisions.insert(precision);
        self.went_on((layer, expert), [precision; 2]);
    }

    /// Counts a change between what an expert was and the first of what it was then; those after that are counted already.
    fn went_on(&mut self, expert: (u32, u32), [first, last]: [Precision; 2]) {
        let known = self.forms.entry(expert).or_insert([first; 2]);
        self.counts.mixed += u64::from(known[1] != first);
        known[1] = last;
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> NetworkUse {
        NetworkUse { peers: self.answered_by.len(), ..self.counts.clone() }
    }
}

impl ExpertNetwork {
    /// Computes the routed experts of one MoE layer on the network.
    ///
    /// `hidden` is `[rows, hidden_size]` after the block's norm; so is the result: the sum over a row's experts of weight
    /// times the expert's row. With [`Combine::Client`] the sum is taken in ascending expert number, the same bits as
    /// [`hanse_model::LocalExperts`], whatever peer computes what.
    ///
    /// Dropping the future resets the calls in flight; nothing is left behind.
    ///
    /// # Errors
    /// [`DispatchError::NoReplica`] after the configured patience; [`DispatchError::Invalid`] for input that does not fit.
    pub async fn forward(
        &self,
        layer: u32,
        hidden: &[f32],
        routing: &Routing,
        usage: &mut Usage,
    ) -> Result<Vec<f32>, DispatchError> {
        self.forward_within(layer, hidden, routing, usage, self.config.replica_patience).await
    }

    /// As [`Self::forward`], waiting for experts that nobody hosts for `patience`.
    pub(crate) async fn forward_within(
        &self,
        layer: u32,
        hidden: &[f32],
        routing: &Routing,
        usage: &mut Usage,
        patience: Duration,
    ) -> Result<Vec<f32>, DispatchError> {
        let width = self.check(layer, hidden, routing)?;
        // The largest answer has a row for each of a row's experts, and must fit into one frame.
        let answer_row = self.config.wire.row_bytes(width) * routing.top_k.max(1);
        let fitting = FrameLimits::default().max_body_bytes as usize / answer_row.max(1);
        let chunk = self.directory.max_rows().min(fitting).max(1);
        self.tally.add(layer, &routing.experts);
        self.enter(layer, routing.rows(), usage);
        let mut output = Vec::with_capacity(hidden.len());
        for first in (0..routing.rows()).step_by(chunk) {
            let last = routing.rows().min(first + chunk);
            let wanted = group_by_expert(routing, first..last);
            let rows = &hidden[first * width..last * width];
            output.extend(Layer::new(self, layer, rows, usage, patience).run(wanted).await?);
            if let Some(recording) = &mut usage.recording {
                recording.end_calls();
            }
        }
        if self.directory.layout().layers.last_key_value().is_some_and(|(&last, _)| layer == last)
            && let Some(recording) = usage.recording.take()
        {
            self.tracer.finish(recording);
        }
        Ok(output)
    }

    /// Begins a layer in the trace of a pass that is written down.
    fn enter(&self, layer: u32, rows: usize, usage: &mut Usage) {
        if self.directory.layout().layers.first_key_value().is_some_and(|(&first, _)| layer == first) {
            usage.recording = self.tracer.begin();
        }
        if let Some(recording) = &mut usage.recording {
            recording.begin_layer(layer, rows);
        }
    }

    fn check(&self, layer: u32, hidden: &[f32], routing: &Routing) -> Result<usize, DispatchError> {
        let layout = self.directory.layout();
        let width = layout.hidden_size as usize;
        let Some(&experts) = layout.layers.get(&layer) else {
            return Err(DispatchError::Invalid(format!("layer {layer} is not an MoE layer of this model")));
        };
        if hidden.len() != routing.rows() * width {
            return Err(DispatchError::Invalid(format!(
                "{} values are not {} rows of {width}",
                hidden.len(),
                routing.rows()
            )));
        }
        if let Some(expert) = routing.experts.iter().find(|&&expert| expert >= experts) {
            return Err(DispatchError::Invalid(format!("layer {layer} has {experts} experts, not expert {expert}")));
        }
        Ok(width)
    }

    pub(crate) fn combine(&self) -> Combine {
        self.config.combine.unwrap_or_else(|| self.config.wire.default_combine())
    }
}

/// The rows of `range` by expert: experts ascending, rows ascending and counted from the range's start.
pub(crate) fn group_by_expert(routing: &Routing, range: std::ops::Range<usize>) -> Vec<ExpertRows> {
    let mut by_expert: std::collections::BTreeMap<u32, ExpertRows> = std::collections::BTreeMap::new();
    for (index, row) in range.enumerate() {
        for (expert, weight) in routing.row(row) {
            let entry =
                by_expert.entry(expert).or_insert_with(|| ExpertRows { expert, rows: Vec::new(), weights: Vec::new() });
            entry.rows.push(index as u32);
            entry.weights.push(weight);
        }
    }
    by_expert.into_values().collect()
}

/// One frame's worth of work: a call for some rows of the layer, with what is needed to place its answer.
#[derive(Debug)]
struct Outgoing {
    frame: Frame,
    /// Rows of the layer that the frame carries, ascending.
    rows: Vec<u32>,
    assignments: usize,
    bytes: u64,
}

/// The rows that `assignments` name, ascending, each once.
fn rows_of(assignments: &[ExpertRows]) -> Vec<u32> {
    let mut rows = Vec::with_capacity(assignments.iter().map(|a| a.rows.len()).sum());
    rows.extend(assignments.iter().flat_map(|a| &a.rows));
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Builds the frame that asks for `assignments` of `model` on the rows they need; rows that no assignment names stay at home.
fn outgoing(
    network: &ExpertNetwork,
    (request_id, model): (u64, ModelId),
    layer: u32,
    hidden: &[f32],
    assignments: &[ExpertRows],
) -> Result<Outgoing, String> {
    let width = network.directory.layout().hidden_size as usize;
    let rows = rows_of(assignments);
    let wire = network.config.wire;
    let mut body = Vec::with_capacity(rows.len() * wire.row_bytes(width));
    for &row in &rows {
        let start = row as usize * width;
        wire.encode_into(&hidden[start..start + width], width, &mut body).map_err(|e| e.to_string())?;
    }
    let position =
        |row: &u32| rows.binary_search(row).map(|index| index as u32).map_err(|_| "row not in frame".to_owned());
    let assignments = assignments
        .iter()
        .map(|a| {
            let rows = a.rows.iter().map(position).collect::<Result<_, _>>()?;
            Ok(ExpertRows { expert: a.expert, rows, weights: a.weights.clone() })
        })
        .collect::<Result<Vec<_>, String>>()?;
    let count = assignments.iter().map(|a| a.rows.len()).sum();
    // Per assignment a row and a weight, per expert its number and a count.
    let bytes = (body.len() + count * 8 + assignments.len() * 12) as u64;
    let frame = Frame::Call(ExpertCall {
        request_id,
        model,
        layer,
        hidden_size: width as u32,
        rows: rows.len() as u32,
        dtype: wire,
        combine: network.combine(),
        deadline_ms: u32::try_from(network.config.call_timeout.as_millis()).unwrap_or(u32::MAX),
        assignments,
        body: Bytes::from(body),
    });
    Ok(Outgoing { frame, rows, assignments: count, bytes })
}

/// Why a call brought no usable answer, and what follows from it.
#[derive(Debug)]
enum CallFailure {
    /// The peer is full or leaving; it is not at fault.
    Busy { retry_after: Duration, text: String },
    /// It failed, was too late or broke the protocol.
    Failed(String),
}

/// Makes one call and decodes its answer to `[rows, hidden_size]`: the frame's rows with [`Combine::Peer`], one row per
/// assignment with [`Combine::Client`]; and tells how long the peer computed. `usual` is what it should take.
async fn call(
    network: &ExpertNetwork,
    peer: PeerId,
    outgoing: &Outgoing,
    usual: Duration,
) -> Result<(Vec<f32>, Duration), CallFailure> {
    let Some(link) = network.directory.link(&peer) else { return Err(CallFailure::Failed("not connected".into())) };
    let started = Instant::now();
    network.directory.sent(&peer, started);
    let reply = link.connection.call(&outgoing.frame, network.config.call_timeout).await;
    let answer = match reply {
        Ok(Frame::Answer(answer)) => answer,
        Ok(Frame::Refusal(refusal)) => {
            let text = format!("{peer} refused ({:?}): {}", refusal.code, refusal.message);
            let retry_after = Duration::from_millis(u64::from(refusal.retry_after_ms.clamp(10, 10_000)));
            if refusal.code == RefusalCode::Draining {
                network.directory.draining(&peer);
            }
            return Err(match refusal.code {
                RefusalCode::Busy | RefusalCode::Draining => CallFailure::Busy { retry_after, text },
                _ => CallFailure::Failed(text),
            });
        }
        Ok(_) => return Err(CallFailure::Failed(format!("{peer} answered a call with another kind of frame"))),
        Err(error) => return Err(CallFailure::Failed(failure_text(peer, &error))),
    };
    // That the answer has the shape that was asked for has been checked by the connection.
    let values = answer.dtype.decode(&answer.body, answer.rows as usize, answer.hidden_size as usize);
    let values = values.map_err(|e| CallFailure::Failed(format!("{peer}: {e}")))?;
    let compute = Duration::from_micros(u64::from(answer.compute_us));
    let now = Instant::now();
    let (assignments, queued_rows) = (outgoing.assignments, answer.queued_rows);
    let answered = AnsweredCall { latency: now - started, compute, usual, assignments, queued_rows };
    network.directory.answered(&peer, now, answered);
    Ok((values, compute))
}

fn failure_text(peer: PeerId, error: &CallError) -> String {
    format!("{peer} did not answer: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(forms: &[Precision]) -> Usage {
        let mut usage = Usage::default();
        forms.iter().for_each(|form| usage.note_form(0, 7, *form));
        usage
    }

    #[test]
    fn a_change_of_precision_counts_once_also_when_a_request_takes_over_what_a_pass_has_counted() {
        use Precision::{Bf16, Q4K, Q8_0};
        let all = [Bf16, Bf16, Q8_0, Q8_0, Q4K, Bf16, Bf16];
        assert_eq!(usage(&all).counts.mixed, 3);
        for cut in 0..=all.len() {
            let (before, after) = all.split_at(cut);
            let mut request = usage(before);
            request.add(&usage(after));
            assert_eq!(request.counts.mixed, 3, "cut before {cut}");
            request.add(&usage(&[Q8_0]));
            assert_eq!(request.counts.mixed, 4, "the last is remembered, cut before {cut}");
            assert_eq!(request.counts.precisions, [Bf16, Q8_0, Q4K].into());
        }
        let mut request = usage(&[Bf16]);
        request.note_form(0, 8, Q8_0);
        request.note_form(1, 7, Q8_0);
        assert_eq!(request.counts.mixed, 0, "other experts");
    }
}
