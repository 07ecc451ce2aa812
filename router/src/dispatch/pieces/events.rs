//! What becomes of calls: answered, slow, late, failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_protocol::Precision;

use super::tree::Answer;
use super::{Layer, Why};
use crate::dispatch::combine::as_answer;
use crate::dispatch::{CallFailure, DispatchError, Outgoing};
use crate::fallback::Fallback;

pub(super) enum Event {
    Answered {
        piece: usize,
        outgoing: Outgoing,
        /// How its peer stores experts, where that matters.
        precision: Option<Precision>,
        result: Result<(Vec<f32>, Duration), CallFailure>,
    },
    /// Slower than nineteen of twenty calls; late after the given time more.
    Slow {
        piece: usize,
        late_in: Duration,
    },
    Late(usize),
    /// Slow, and its peer was set aside meanwhile.
    Hopeless(usize),
    FellBack {
        piece: usize,
        result: Result<(Vec<u32>, Vec<f32>), String>,
    },
    Dropped,
}

impl Layer<'_> {
    pub(super) fn on_event(&mut self, event: Event) -> Result<(), DispatchError> {
        match event {
            Event::Dropped => Ok(()),
            Event::Slow { piece, late_in } => {
                if !self.pieces.is_waiting(piece) {
                    return Ok(());
                }
                let Some(&peer) = self.pieces[piece].tried.last() else { return Ok(()) };
                let directory = self.network.directory.clone();
                self.events.push(Box::pin(async move {
                    let late = tokio::time::sleep(late_in);
                    tokio::select! {
                        () = late => Event::Late(piece),
                        // Another request has found out what is wrong.
                        () = directory.set_aside(&peer) => Event::Hopeless(piece),
                    }
                }));
                if self.pieces[piece].children.is_empty() && self.network.hedges.spend() {
                    // No other replica is no error: the answer may still come.
                    self.split(piece, &Why::Hedge)?;
                }
                Ok(())
            }
            Event::Late(piece) => {
                if !self.pieces.is_waiting(piece) {
                    return Ok(());
                }
                if let Some(peer) = self.pieces[piece].tried.last() {
                    tracing::debug!(layer = self.layer, %peer, "call is late");
                    // Out of every route at once, until it shows that it still answers.
                    self.network.directory.failed(peer, Instant::now());
                }
                self.rescue(piece)
            }
            Event::Hopeless(piece) if self.pieces.is_waiting(piece) => self.rescue(piece),
            Event::Hopeless(_) => Ok(()),
            Event::FellBack { piece, result } => match result {
                Ok((rows, values)) => {
                    if !self.pieces[piece].resolved {
                        self.pieces[piece].answer = Some(Answer { rows, values, precision: None });
                        self.pieces.resolve(piece);
                    }
                    Ok(())
                }
                Err(reason) => {
                    self.last_failure = Some(reason);
                    self.stuck.push(piece);
                    Err(self.no_replica())
                }
            },
            Event::Answered { piece, outgoing, precision, result: Ok((values, compute)) } => {
                if let Some(recording) = &mut self.usage.recording {
                    recording.ended(piece, Some(compute));
                }
                if let Some(peer) = self.pieces[piece].tried.last() {
                    self.usage.answered_by.insert(*peer);
                }
                let width = self.network.directory.layout().hidden_size as usize;
                let rows = values.len() / width.max(1);
                self.usage.counts.bytes_received += (rows * self.network.config.wire.row_bytes(width)) as u64;
                if !self.pieces[piece].resolved {
                    self.pieces[piece].answer = Some(Answer { rows: outgoing.rows, values, precision });
                    self.pieces.resolve(piece);
                }
                Ok(())
            }
            Event::Answered { piece, result: Err(failure), .. } => self.on_failure(piece, failure),
        }
    }

    /// Asks others for the work of a call that is not to be waited for, if that was not done yet.
    fn rescue(&mut self, piece: usize) -> Result<(), DispatchError> {
        if self.pieces[piece].children.is_empty() { self.split(piece, &Why::Rescue) } else { Ok(()) }
    }

    /// Has the fallback compute a piece.
    pub(super) fn fall_back(&mut self, piece: usize, fallback: Arc<dyn Fallback>) {
        let width = self.network.directory.layout().hidden_size as usize;
        let assignments = self.pieces[piece].assignments.clone();
        let row = |row: &u32| &self.hidden[*row as usize * width..(*row as usize + 1) * width];
        let inputs: Vec<Vec<f32>> =
            assignments.iter().map(|a| a.rows.iter().flat_map(row).copied().collect()).collect();
        let (layer, combine) = (self.layer, self.network.combine());
        self.usage.counts.fallbacks += assignments.len() as u64;
        let computing = tokio::task::spawn_blocking(move || {
            let outputs = assignments.iter().zip(&inputs).map(|(a, input)| fallback.compute(layer, a.expert, input));
            let outputs = outputs.collect::<Result<Vec<Vec<f32>>, String>>()?;
            Ok(as_answer(combine, width, &assignments, &outputs))
        });
        self.events.push(Box::pin(async move {
            let result = computing.await.unwrap_or_else(|e| Err(format!("the fallback failed: {e}")));
            Event::FellBack { piece, result }
        }));
    }

    fn on_failure(&mut self, piece: usize, failure: CallFailure) -> Result<(), DispatchError> {
        let now = Instant::now();
        if let Some(recording) = &mut self.usage.recording {
            recording.ended(piece, None);
        }
        let peer = self.pieces[piece].tried.last().copied();
        let text = match failure {
            CallFailure::Busy { retry_after, text } => {
                if let Some(peer) = peer {
                    self.network.directory.busy(&peer, now + retry_after);
                }
                text
            }
            CallFailure::Failed(text) => {
                if let Some(peer) = peer {
                    self.network.directory.failed(&peer, now);
                }
                text
            }
        };
        tracing::debug!(layer = self.layer, reason = %text, "call failed");
        self.last_failure = Some(text);
        self.pieces[piece].failed = true;
        if self.pieces[piece].resolved || !self.pieces[piece].children.is_empty() {
            return Ok(());
        }
        self.split(piece, &Why::Retry)
    }

    /// Looks again for peers for the work that has none: any peer will do now, also one that failed before.
    pub(super) fn retry_stuck(&mut self) -> Result<(), DispatchError> {
        for piece in std::mem::take(&mut self.stuck) {
            if self.pieces[piece].resolved {
                continue;
            }
            self.pieces[piece].tried.clear();
            // Peers that asked for time or failed a moment ago are left alone until their time is over.
            if self.plan(&self.pieces[piece].assignments, &[], false).is_ok() {
                self.split(piece, &Why::Retry)?;
            } else {
                self.stuck.push(piece);
            }
        }
        Ok(())
    }
}
