//! What waits, in the order of fair turns. Pure; the clock is an argument.
//!
//! Whose request is next is who would be done first if all clients were served at the same time, each at an equal rate (weighted fair
//! queueing: Parekh and Gallager, 1993). So nobody waits for one who asks for more, and nobody is done later than with such equal parts
//! but for the pass that runs when they come. Requests are done one after the other, not all at the end: while an answer and the
//! next request travel, others are computed.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hanse_protocol::PeerId;
use tokio::sync::oneshot;

use super::{Done, Work, WorkError};

/// (row, expert) pairs joined in one pass: beyond this, larger batches gain nothing and only delay the first answer.
pub(super) const PAIRS_PER_PASS: usize = 1024;

/// Work with what has become of it.
pub(super) struct Request {
    pub(super) work: Work,
    pub(super) pairs: usize,
    since: Instant,
    progress: Mutex<Progress>,
}

struct Progress {
    /// How long it had waited when its first pass began.
    queued: Option<Duration>,
    computed: Duration,
    /// Pairs that have been computed.
    pairs: usize,
    values: Vec<f32>,
    /// Gone when there is nothing more to say.
    reply: Option<oneshot::Sender<Result<Done, WorkError>>>,
}

/// A range of a request's pairs. Several of one request come in order.
pub(super) type Slice = (Arc<Request>, Range<usize>);

impl Request {
    pub(super) fn new(work: Work) -> (Arc<Self>, oneshot::Receiver<Result<Done, WorkError>>) {
        let (reply, answer) = oneshot::channel();
        let progress =
            Progress { queued: None, computed: Duration::ZERO, pairs: 0, values: Vec::new(), reply: Some(reply) };
        let (pairs, since) = (work.pairs(), Instant::now());
        (Arc::new(Self { work, pairs, since, progress: Mutex::new(progress) }), answer)
    }

    /// Notes that so many more pairs were computed, in a pass that began at `started`; `add` adds their values. Answers when these
    /// were the last.
    pub(super) fn advance(&self, pairs: usize, started: Instant, computed: Duration, add: impl FnOnce(&mut Vec<f32>)) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.queued.get_or_insert(started.saturating_duration_since(self.since));
        progress.computed += computed;
        progress.pairs += pairs;
        add(&mut progress.values);
        if progress.pairs == self.pairs
            && let Some(reply) = progress.reply.take()
        {
            let (values, queued) = (std::mem::take(&mut progress.values), progress.queued.unwrap_or_default());
            let done = Done { values, queued, computed: progress.computed };
            // The caller may have gone.
            let _ = reply.send(Ok(done));
        }
    }

    pub(super) fn refuse(&self, error: WorkError) {
        if let Some(reply) = self.progress.lock().unwrap_or_else(PoisonError::into_inner).reply.take() {
            // The caller may be gone as well.
            let _ = reply.send(Err(error));
        }
    }

    /// Its work failed through a defect.
    pub(super) fn give_up(&self) {
        self.refuse(WorkError::Lost);
    }

    /// Whether computing on is of no use.
    fn is_over(&self, now: Instant) -> bool {
        if self.work.cancel.is_cancelled()
            || self.progress.lock().unwrap_or_else(PoisonError::into_inner).reply.is_none()
        {
            return true;
        }
        if self.work.deadline <= now {
            self.refuse(WorkError::DeadlinePassed);
            return true;
        }
        false
    }
}

/// A request in the queue.
struct Waiting {
    request: Arc<Request>,
    /// Pairs of it that passes have taken.
    taken: usize,
}

/// A client who waits, or who was served before others of whom that cannot be said yet: with equal parts it would still wait.
#[derive(Default)]
struct Line {
    /// Pairs that wait.
    pairs: usize,
    /// When the last of its requests would be done: see [`Queue::served`].
    finish: u64,
}

/// A pair counts so much in [`Queue::served`], so that parts of one do.
const PAIR: u64 = 1 << 10;

/// Requests that wait.
#[derive(Default)]
pub(super) struct Queue {
    /// By when they would be done if all clients were served at the same time, then by their arrival.
    waiting: BTreeMap<(u64, u64), Waiting>,
    lines: HashMap<PeerId, Line>,
    /// What each client who always waited would have been served at an equal rate since the queue was empty.
    served: u64,
    arrived: u64,
    pairs: usize,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn pairs(&self) -> usize {
        self.pairs
    }

    /// Adds a request.
    ///
    /// # Errors
    /// [`WorkError::Full`] where more than `max_pairs` would wait. A client that would have no more than its equal share of them is
    /// let in all the same, up to twice as many in all, so that one who asks for much cannot keep others out.
    pub(super) fn push(&mut self, request: Arc<Request>, max_pairs: usize) -> Result<(), WorkError> {
        let client = request.work.client;
        let total = self.pairs.saturating_add(request.pairs);
        // An empty queue takes work of any size, or a large request could never be served.
        if !self.is_empty() && total > max_pairs {
            let own = self.lines.get(&client).map_or(0, |line| line.pairs);
            let clients = self.lines.values().filter(|line| line.pairs > 0).count() + usize::from(own == 0);
            if own + request.pairs > max_pairs / clients || total > 2 * max_pairs {
                return Err(WorkError::Full);
            }
        }
        self.pairs = total;
        let line = self.lines.entry(client).or_default();
        line.pairs += request.pairs;
        line.finish = line.finish.max(self.served) + request.pairs as u64 * PAIR;
        self.arrived += 1;
        self.waiting.insert((line.finish, self.arrived), Waiting { request, taken: 0 });
        Ok(())
    }

    /// The next pass. Requests that nobody waits for any more are dropped.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Slice> {
        let mut slices = Vec::new();
        let mut room = PAIRS_PER_PASS;
        while room > 0
            && let Some(mut first) = self.waiting.first_entry()
        {
            let Waiting { request, taken } = first.get_mut();
            let left = request.pairs - *taken;
            let (client, is_over) = (request.work.client, request.is_over(now));
            let gone = if is_over { left } else { left.min(room) };
            if !is_over {
                slices.push((request.clone(), *taken..*taken + gone));
                room -= gone;
            }
            *taken += gone;
            if gone == left {
                first.remove();
            }
            self.pairs -= gone;
            if let Some(line) = self.lines.get_mut(&client) {
                line.pairs -= gone;
                if is_over {
                    line.finish = line.finish.saturating_sub(gone as u64 * PAIR);
                }
            }
        }
        if self.is_empty() {
            self.lines.clear();
            self.served = 0;
        } else {
            self.serve((PAIRS_PER_PASS - room) as u64 * PAIR);
        }
        slices
    }

    /// Counts what was served as if each client had got an equal part of it, but for those who would have been done before.
    fn serve(&mut self, mut done: u64) {
        let mut finishes: Vec<u64> = self.lines.values().map(|line| line.finish).collect();
        finishes.sort_unstable();
        for (index, &finish) in finishes.iter().enumerate() {
            let clients = (finishes.len() - index) as u64;
            let part = finish.saturating_sub(self.served).min(done / clients);
            self.served += part;
            done -= part * clients;
        }
        self.lines.retain(|_, line| line.pairs > 0 || line.finish > self.served);
    }
}
