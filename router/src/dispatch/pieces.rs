//! The bookkeeping of one layer: which part of the work is asked of whom, and what became of it.
//!
//! The work is a tree of *pieces*. The root stands for the whole layer and is never sent itself; every other piece is one
//! call. When a call fails, is slow or late, its work is planned again as child pieces on other replicas. A piece is resolved by
//! its own answer or by all of its children, whichever comes first; calls that are no longer needed are dropped, which
//! resets their streams. Work that has had no replica for long is computed by the fallback, if there is one.

mod events;
mod tree;

use std::pin::Pin;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{AbortHandle, Abortable};
use futures::stream::FuturesUnordered;
use hanse_protocol::{Combine, ExpertRows, PeerId};
use tokio::task::JoinHandle;

use super::combine::add_answers;
use super::trace::Reason;
use super::{DispatchError, Usage, call, outgoing};
use crate::network::ExpertNetwork;
use crate::plan::{Share, plan};
use events::Event;
use tree::{ROOT, Tree};

/// How often experts without a replica are looked for again.
const STUCK_RETRY: Duration = Duration::from_millis(50);

enum Why {
    First,
    Retry,
    /// The call is slow, but its peer seems to be well.
    Hedge,
    /// The call is late: its peer is not to be relied on.
    Rescue,
}

impl Why {
    fn reason(&self) -> Reason {
        match self {
            Self::First => Reason::First,
            Self::Retry => Reason::Retry,
            Self::Hedge | Self::Rescue => Reason::Hedge,
        }
    }
}

type EventFuture<'a> = Pin<Box<dyn Future<Output = Event> + Send + 'a>>;

pub(super) struct Layer<'a> {
    network: &'a ExpertNetwork,
    layer: u32,
    hidden: &'a [f32],
    usage: &'a mut Usage,
    /// How long experts that nobody hosts are waited for.
    patience: Duration,
    pieces: Tree,
    events: FuturesUnordered<EventFuture<'a>>,
    /// Pieces whose work has no replica at present.
    stuck: Vec<usize>,
    last_failure: Option<String>,
}

impl<'a> Layer<'a> {
    pub(super) fn new(
        network: &'a ExpertNetwork,
        layer: u32,
        hidden: &'a [f32],
        usage: &'a mut Usage,
        patience: Duration,
    ) -> Self {
        Self {
            network,
            layer,
            hidden,
            usage,
            patience,
            pieces: Tree::default(),
            events: FuturesUnordered::new(),
            stuck: Vec::new(),
            last_failure: None,
        }
    }

    /// Computes `wanted` (experts ascending) and returns `[rows, hidden_size]`.
    pub(super) async fn run(mut self, wanted: Vec<ExpertRows>) -> Result<Vec<f32>, DispatchError> {
        let (here, wanted) = self.split_off_resident(wanted);
        self.usage.counts.resident += here.iter().map(|assigned| assigned.rows.len() as u64).sum::<u64>();
        // While the calls are on their way.
        let computing = self.compute_resident(here);
        if !wanted.is_empty() {
            self.call_peers(wanted).await?;
        }
        self.note_forms();
        let resident = match computing {
            Some(computing) => Some(computing.await.map_err(|e| DispatchError::Resident(e.to_string()))?),
            None => None,
        };
        Ok(self.add_up(resident))
    }

    /// What is computed here and what is asked of peers. Peers that add up need all of a row's experts that they host.
    fn split_off_resident(&self, wanted: Vec<ExpertRows>) -> (Vec<ExpertRows>, Vec<ExpertRows>) {
        match &self.network.config.resident {
            Some(resident) if self.network.combine() == Combine::Client => resident.held().split(self.layer, wanted),
            _ => (Vec::new(), wanted),
        }
    }

    fn compute_resident(&self, here: Vec<ExpertRows>) -> Option<JoinHandle<(Vec<ExpertRows>, Vec<f32>)>> {
        let resident = self.network.config.resident.clone().filter(|_| !here.is_empty())?;
        let (held, layer, hidden) = (resident.held(), self.layer, self.hidden.to_vec());
        let width = self.network.directory.layout().hidden_size as usize;
        Some(tokio::task::spawn_blocking(move || {
            let values = resident.compute(&held, layer, &hidden, width, &here);
            (here, values)
        }))
    }

    /// Has peers compute `wanted`, which is not empty.
    async fn call_peers(&mut self, wanted: Vec<ExpertRows>) -> Result<(), DispatchError> {
        self.usage.counts.round_trips += 1;
        self.pieces.plant(wanted);
        self.split(ROOT, &Why::First)?;
        let mut stuck_since: Option<Instant> = None;
        while !self.pieces[ROOT].resolved {
            if self.stuck.is_empty() {
                stuck_since = None;
            } else if stuck_since.get_or_insert_with(Instant::now).elapsed() > self.patience {
                let Some(fallback) = self.network.config.fallback.clone() else { return Err(self.no_replica()) };
                for piece in std::mem::take(&mut self.stuck) {
                    self.network.orphans.add(self.layer, &self.pieces[piece].assignments);
                    self.fall_back(piece, fallback.clone());
                }
            }
            tokio::select! {
                Some(event) = self.events.next() => self.on_event(event)?,
                () = tokio::time::sleep(STUCK_RETRY), if !self.stuck.is_empty() => self.retry_stuck()?,
                else => return Err(self.no_replica()),
            }
        }
        Ok(())
    }

    fn no_replica(&self) -> DispatchError {
        let mut experts: Vec<u32> =
            self.stuck.iter().flat_map(|&p| self.pieces[p].assignments.iter().map(|a| a.expert)).collect();
        experts.sort_unstable();
        experts.dedup();
        DispatchError::NoReplica { layer: self.layer, experts, reason: self.last_failure.clone() }
    }

    fn plan(&self, wanted: &[ExpertRows], tried: &[PeerId], also_avoided: bool) -> Result<Vec<Share>, Vec<u32>> {
        let candidates = self.network.directory.candidates(self.layer, wanted, tried, also_avoided, Instant::now());
        // The same layer goes to the same peers as long as they are as good as others; another layer to others.
        plan(wanted, &candidates, self.network.salt.wrapping_add(u64::from(self.layer)))
    }

    /// Plans a piece's work onto peers that were not asked for it yet, and calls them. Experts that have no such peer wait; a
    /// hedge is all or nothing instead, since the piece's own answer may still come.
    fn split(&mut self, parent: usize, why: &Why) -> Result<(), DispatchError> {
        let (wanted, tried) = (self.pieces[parent].assignments.clone(), self.pieces[parent].tried.clone());
        let (mut shares, mut without) = (Vec::new(), Vec::new());
        match (self.plan(&wanted, &tried, false), why) {
            (Ok(planned), _) => shares = planned,
            // A call that is merely slow is not given to a peer that failed lately.
            (Err(_), Why::Hedge) => return Ok(()),
            // Better such a peer than nobody.
            (Err(_), Why::Rescue) => shares = self.plan(&wanted, &tried, true).unwrap_or_default(),
            (Err(_), Why::First | Why::Retry) => match self.plan(&wanted, &tried, true) {
                Ok(planned) => shares = planned,
                Err(missing) => {
                    let hosted;
                    (without, hosted) = wanted.into_iter().partition(|a| missing.contains(&a.expert));
                    shares.extend(self.plan(&hosted, &tried, true).unwrap_or_default());
                }
            },
        }
        let strand_all = shares.is_empty();
        for share in shares {
            let mut tried = tried.clone();
            tried.push(share.peer);
            self.start(parent, share.peer, share.assignments, tried, why)?;
            match why {
                Why::First => self.network.hedges.earn(),
                Why::Retry => self.usage.counts.retries += 1,
                Why::Hedge | Why::Rescue => self.usage.counts.hedged += 1,
            }
        }
        if matches!(why, Why::Rescue) {
            // Its own answer may still come.
            return Ok(());
        }
        if strand_all {
            self.strand(parent);
        } else if !without.is_empty() {
            let piece = self.pieces.add(parent, without, tried, None);
            self.strand(piece);
        }
        Ok(())
    }

    /// Has a piece without a peer wait for one; or not, if its experts were waited for in vain before.
    fn strand(&mut self, piece: usize) {
        match &self.network.config.fallback {
            Some(fallback) if self.network.orphans.contains(self.layer, &self.pieces[piece].assignments) => {
                self.fall_back(piece, fallback.clone());
            }
            _ => self.stuck.push(piece),
        }
    }

    fn start(
        &mut self,
        parent: usize,
        peer: PeerId,
        assignments: Vec<ExpertRows>,
        tried: Vec<PeerId>,
        why: &Why,
    ) -> Result<(), DispatchError> {
        let piece = self.pieces.next();
        let request_id = self.network.next_request_id();
        let form = self.network.directory.form_of(&peer);
        let model = form.map_or(self.network.model, |(model, _)| model);
        let outgoing = outgoing(self.network, (request_id, model), self.layer, self.hidden, &assignments)
            .map_err(DispatchError::Invalid)?;
        self.usage.counts.frames += 1;
        self.usage.counts.bytes_sent += outgoing.bytes;
        if let Some(recording) = &mut self.usage.recording {
            recording.sent(piece, peer, outgoing.rows.len(), assignments.len(), why.reason());
        }

        let expected = self.network.directory.expectation(&peer, outgoing.assignments, Instant::now());
        let late = expected.late.min(self.network.config.call_timeout);
        let slow = expected.slow.min(late);
        let (abort, registration) = AbortHandle::new_pair();
        let network = self.network;
        self.events.push(Box::pin(async move {
            let made = async {
                let result = call(network, peer, &outgoing, expected.usual).await;
                Event::Answered { piece, outgoing, precision: form.map(|(_, precision)| precision), result }
            };
            Abortable::new(made, registration).await.unwrap_or(Event::Dropped)
        }));
        self.events.push(Box::pin(async move {
            tokio::time::sleep(slow).await;
            Event::Slow { piece, late_in: late - slow }
        }));
        self.pieces.add(parent, assignments, tried, Some(abort));
        Ok(())
    }

    /// Notes how the experts were stored whose answers count: of two that came for the same work only one does.
    fn note_forms(&mut self) {
        for (assigned, answer) in self.pieces.answers() {
            let Some(precision) = answer.precision else { continue };
            assigned.iter().for_each(|assigned| self.usage.note_form(self.layer, assigned.expert, precision));
        }
    }

    fn add_up(&self, resident: Option<(Vec<ExpertRows>, Vec<f32>)>) -> Vec<f32> {
        let width = self.network.directory.layout().hidden_size as usize;
        let mut output = vec![0.0; self.hidden.len()];
        let answers = self.pieces.answers().into_iter();
        let answers = answers.map(|(assigned, answer)| (assigned, answer.rows.as_slice(), answer.values.as_slice()));
        let resident = resident.as_ref().map(|(assigned, values)| (assigned.as_slice(), &[][..], values.as_slice()));
        add_answers(self.network.combine(), width, answers.chain(resident), &mut output);
        output
    }
}
