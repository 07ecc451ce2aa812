//! Computes experts for all clients: rows that wait for the same expert are joined, and clients take turns.
//!
//! Work queues up in one bounded queue, in the order in which clients would be done with equal shares. A *pass* takes what comes first, at most
//! so many (row, expert) pairs, joins the rows of each expert over all requests, and has them computed as one piece of work. A large
//! request is computed in several passes, so that it keeps nobody who asks for less waiting for longer than one.
//!
//! While a pass runs, others queue for the next one: a busy batcher reads each expert's weights once for all who wait, and an idle one
//! adds no delay. Small work that meets an idle batcher is computed at once in the caller's task, as waking a thread would take longer
//! than the work; everything else, and what a card computes, goes to one thread. A row's result does not depend on who else is in a pass.

mod compute;
mod queue;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hanse_protocol::{Combine, ExpertRows, PeerId};
use tokio_util::sync::CancellationToken;

use crate::store::{ExpertStore, Snapshot};
use compute::compute;
use queue::{Queue, Request, Slice};

/// Bytes of weights times rows up to which work is computed in the caller's task: some 50 microseconds of one core, and below what
/// a second core would be woken for.
const AT_ONCE: u64 = 3 << 19;

/// One request's work on one layer.
#[derive(Debug)]
pub(crate) struct Work {
    /// Who asks: clients share the batcher equally.
    pub(crate) client: PeerId,
    pub(crate) layer: u32,
    /// The experts: those that the store held when the work was accepted.
    pub(crate) experts: Snapshot,
    /// Values in a row.
    pub(crate) hidden_size: usize,
    /// `[rows, hidden_size]`.
    pub(crate) hidden: Vec<f32>,
    /// Experts of the snapshot, each with rows of `hidden`; ascending.
    pub(crate) assignments: Vec<ExpertRows>,
    pub(crate) combine: Combine,
    /// Nobody waits for the answer after this.
    pub(crate) deadline: Instant,
    /// Fires when nobody waits for the answer any more.
    pub(crate) cancel: CancellationToken,
}

impl Work {
    /// (row, expert) pairs.
    fn pairs(&self) -> usize {
        self.assignments.iter().map(|assigned| assigned.rows.len()).sum()
    }

    /// Whether it is quickly done by the caller itself. A card computes while the caller waits.
    fn is_small(&self) -> bool {
        let bytes = |assigned: &ExpertRows| match self.experts.expert(self.layer, assigned.expert) {
            Some(expert) if !expert.device().is_host() => u64::MAX,
            Some(expert) => expert.bytes().saturating_mul(assigned.rows.len() as u64),
            None => 0,
        };
        self.assignments.iter().map(bytes).fold(0, u64::saturating_add) < AT_ONCE
    }
}

/// The answer to [`Work`].
#[derive(Debug)]
pub(crate) struct Done {
    /// One row per row with [`Combine::Peer`], one per assignment with [`Combine::Client`].
    pub(crate) values: Vec<f32>,
    pub(crate) queued: Duration,
    pub(crate) computed: Duration,
}

/// Why work was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WorkError {
    /// The queue is full.
    #[error("the queue is full")]
    Full,
    /// It waited until its deadline.
    #[error("the deadline passed in the queue")]
    DeadlinePassed,
    /// The device that holds some of the experts failed. Others may have them.
    #[error("the device that holds the experts failed")]
    Device,
    /// Another program has the device that holds some of the experts. Others may have them.
    #[error("the device that holds the experts was given to another program")]
    Lent,
    /// The batcher has stopped, or failed at this work.
    #[error("the work was lost")]
    Lost,
}

#[derive(Default)]
struct State {
    queue: Queue,
    /// A pass runs, in the thread or in a caller's task. Never two at a time: they would only take the cores from each other.
    computing: bool,
    stopped: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is work for the thread, or it has to stop.
    arrived: Condvar,
    /// What is told when a device fails.
    store: Arc<ExpertStore>,
    max_pairs: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a pass; [`State::computing`] is set.
    fn pass(&self, slices: &[Slice]) {
        // A defect in one pass must not end the service: its callers see that their work was lost.
        if std::panic::catch_unwind(AssertUnwindSafe(|| compute(slices, &self.store))).is_err() {
            tracing::error!("computing a batch panicked");
            slices.iter().for_each(|(request, _)| request.give_up());
        }
    }
}

/// Owns the computing thread; stops it when dropped.
pub(crate) struct Batcher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Batcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batcher").field("queued_pairs", &self.queued_pairs()).finish_non_exhaustive()
    }
}

impl Batcher {
    /// Starts the computing thread. At most `max_pairs` (row, expert) pairs wait at a time, or twice as many where clients that
    /// have less than their share of them come to a full queue.
    pub(crate) fn start(store: Arc<ExpertStore>, max_pairs: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), arrived: Condvar::new(), store, max_pairs });
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name("experts".into()).spawn(move || compute_loop(&worker))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many (row, expert) pairs wait at present.
    pub(crate) fn queued_pairs(&self) -> usize {
        self.shared.lock().queue.pairs()
    }

    /// The most that may wait before work is refused.
    pub(crate) fn max_pairs(&self) -> usize {
        self.shared.max_pairs
    }

    /// Does work, now or in its turn, and waits for its answer. There is at least one row, and the experts are in the snapshot.
    ///
    /// # Errors
    /// [`WorkError::Full`] at once; the others later. Dropping the future does not take the work back: see [`Work::cancel`].
    pub(crate) async fn run(&self, work: Work) -> Result<Done, WorkError> {
        let small = work.is_small();
        let (request, answer) = Request::new(work);
        let at_once = {
            let mut state = self.shared.lock();
            if state.stopped {
                return Err(WorkError::Lost);
            }
            let at_once = small && !state.computing && state.queue.is_empty();
            if at_once {
                state.computing = true;
            } else {
                state.queue.push(request.clone(), self.shared.max_pairs)?;
                if !state.computing {
                    self.shared.arrived.notify_one();
                }
            }
            at_once
        };
        if at_once {
            let pairs = request.pairs;
            self.shared.pass(&[(request, 0..pairs)]);
            let mut state = self.shared.lock();
            state.computing = false;
            if !state.queue.is_empty() {
                self.shared.arrived.notify_one();
            }
        }
        answer.await.unwrap_or(Err(WorkError::Lost))
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        let dropped = {
            let mut state = self.shared.lock();
            state.stopped = true;
            std::mem::take(&mut state.queue)
        };
        drop(dropped);
        self.shared.arrived.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn compute_loop(shared: &Shared) {
    loop {
        let slices = {
            let mut state = shared.lock();
            while (state.queue.is_empty() || state.computing) && !state.stopped {
                state = shared.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopped {
                return;
            }
            state.computing = true;
            state.queue.take(Instant::now())
        };
        shared.pass(&slices);
        shared.lock().computing = false;
    }
}

#[cfg(test)]
mod tests;
