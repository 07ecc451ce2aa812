//! What waits: a line of requests for each client. Pure; the clock is an argument.

use std::collections::{HashMap, VecDeque};
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

/// One client's requests.
#[derive(Default)]
struct Line {
    requests: VecDeque<Arc<Request>>,
    /// Pairs of the first one that passes have taken.
    taken: usize,
    /// Pairs that wait.
    pairs: usize,
}

/// Requests that wait, by client. Clients without any are not in it.
#[derive(Default)]
pub(super) struct Queue {
    lines: HashMap<PeerId, Line>,
    /// Whose turn it is, first in front.
    turns: VecDeque<PeerId>,
    pairs: usize,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    pub(super) fn pairs(&self) -> usize {
        self.pairs
    }

    /// Adds a request at the end of its client's line.
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
            let clients = self.lines.len() + usize::from(own == 0);
            if own + request.pairs > max_pairs / clients || total > 2 * max_pairs {
                return Err(WorkError::Full);
            }
        }
        self.pairs = total;
        let line = self.lines.entry(client).or_insert_with(|| {
            self.turns.push_back(client);
            Line::default()
        });
        line.pairs += request.pairs;
        line.requests.push_back(request);
        Ok(())
    }

    /// The next pass: as many pairs of each client, and what some leave free to the others. Who found no room is first in the next
    /// one. Requests that nobody waits for any more are dropped.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Slice> {
        let mut slices = Vec::new();
        let mut room = PAIRS_PER_PASS;
        while room > 0 && !self.turns.is_empty() {
            let share = room.div_ceil(self.turns.len());
            for _ in 0..self.turns.len() {
                if room == 0 {
                    break;
                }
                let Some(client) = self.turns.pop_front() else { break };
                let Some(line) = self.lines.get_mut(&client) else { continue };
                let before = line.pairs;
                room -= line.take(share.min(room), now, &mut slices);
                self.pairs -= before - line.pairs;
                if line.requests.is_empty() {
                    self.lines.remove(&client);
                } else {
                    self.turns.push_back(client);
                }
            }
        }
        slices
    }
}

impl Line {
    /// Adds up to `most` pairs of the first requests to `slices`; returns how many.
    fn take(&mut self, most: usize, now: Instant, slices: &mut Vec<Slice>) -> usize {
        let mut taken = 0;
        while let Some(request) = self.requests.front() {
            let left = request.pairs - self.taken;
            if request.is_over(now) {
                self.pairs -= left;
                (self.taken, _) = (0, self.requests.pop_front());
                continue;
            }
            let now_taken = left.min(most - taken);
            if now_taken == 0 {
                break;
            }
            slices.push((request.clone(), self.taken..self.taken + now_taken));
            taken += now_taken;
            self.pairs -= now_taken;
            self.taken += now_taken;
            if now_taken == left {
                (self.taken, _) = (0, self.requests.pop_front());
            }
        }
        taken
    }
}
