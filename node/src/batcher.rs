//! Computes experts for all clients: rows that wait for the same expert are joined.
//!
//! Requests queue up in one bounded queue. One thread takes what has queued while it was busy, joins the rows of each expert over
//! all requests, and has them computed as one piece of work. An idle batcher therefore adds no delay, and a busy one reads
//! each expert's weights once for all who wait. A row's result does not depend on who else is in the batch.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hanse_model::{ExpertJob, add_weighted, run_experts};
use hanse_protocol::{Combine, ExpertRows};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::store::Snapshot;

/// (row, expert) pairs joined in one pass: beyond this, larger batches gain nothing and only delay the first answer.
const PAIRS_PER_PASS: usize = 1024;

/// One request's work on one layer.
#[derive(Debug)]
pub(crate) struct Work {
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
    /// The batcher has stopped, or failed at this work.
    #[error("the work was lost")]
    Lost,
}

struct Queued {
    work: Work,
    pairs: usize,
    since: Instant,
    reply: oneshot::Sender<Result<Done, WorkError>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Queued>,
    pairs: usize,
    stopped: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    max_pairs: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Starts the computing thread. At most `max_pairs` (row, expert) pairs wait at a time.
    pub(crate) fn start(pool: Arc<rayon::ThreadPool>, max_pairs: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), arrived: Condvar::new(), max_pairs });
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name("experts".into()).spawn(move || compute_loop(&worker, &pool))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many (row, expert) pairs wait at present.
    pub(crate) fn queued_pairs(&self) -> usize {
        self.shared.lock().pairs
    }

    /// The most that may wait.
    pub(crate) fn max_pairs(&self) -> usize {
        self.shared.max_pairs
    }

    /// Queues work and waits for its answer. The experts named in it must be in its snapshot.
    ///
    /// # Errors
    /// [`WorkError::Full`] at once; the others later. Dropping the future does not take the work back: see [`Work::cancel`].
    pub(crate) async fn run(&self, work: Work) -> Result<Done, WorkError> {
        let pairs = work.assignments.iter().map(|a| a.rows.len()).sum();
        let (reply, answer) = oneshot::channel();
        {
            let mut queue = self.shared.lock();
            if queue.stopped {
                return Err(WorkError::Lost);
            }
            // An empty queue takes work of any size, or a large request could never be served.
            if !queue.waiting.is_empty() && queue.pairs + pairs > self.shared.max_pairs {
                return Err(WorkError::Full);
            }
            queue.pairs += pairs;
            queue.waiting.push_back(Queued { work, pairs, since: Instant::now(), reply });
        }
        self.shared.arrived.notify_one();
        answer.await.unwrap_or(Err(WorkError::Lost))
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        let dropped = {
            let mut queue = self.shared.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.waiting)
        };
        drop(dropped);
        self.shared.arrived.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn compute_loop(shared: &Shared, pool: &rayon::ThreadPool) {
    loop {
        let batch = {
            let mut queue = shared.lock();
            while queue.waiting.is_empty() && !queue.stopped {
                queue = shared.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.stopped {
                return;
            }
            take_batch(&mut queue)
        };
        // A defect in one batch must not end the service: its callers see that their work was lost.
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| compute(batch, pool)));
        if done.is_err() {
            tracing::error!("computing a batch panicked");
        }
    }
}

/// The longest waiting requests up to the pass's size, without those that nobody waits for.
fn take_batch(queue: &mut Queue) -> Vec<Queued> {
    let now = Instant::now();
    let mut batch = Vec::new();
    let mut pairs = 0;
    while let Some(next) = queue.waiting.front() {
        if !batch.is_empty() && pairs + next.pairs > PAIRS_PER_PASS {
            break;
        }
        let Some(next) = queue.waiting.pop_front() else { break };
        queue.pairs -= next.pairs;
        if next.work.cancel.is_cancelled() {
            continue;
        }
        if next.work.deadline <= now {
            // The caller may be gone as well.
            let _ = next.reply.send(Err(WorkError::DeadlinePassed));
            continue;
        }
        pairs += next.pairs;
        batch.push(next);
    }
    batch
}

/// The rows of one expert over all requests of a batch.
struct Joined {
    /// The expert as the first of the requests has it; the others have the same weights.
    experts: Snapshot,
    /// Request and index of the assignment in it, in the order of the rows.
    parts: Vec<(usize, usize)>,
    input: Vec<f32>,
    output: Vec<f32>,
}

fn compute(batch: Vec<Queued>, pool: &rayon::ThreadPool) {
    let started = Instant::now();
    let Some(width) = batch.first().map(|queued| queued.work.hidden_size) else { return };
    let mut joined: BTreeMap<(u32, u32), Joined> = BTreeMap::new();
    for (request, queued) in batch.iter().enumerate() {
        for (index, assigned) in queued.work.assignments.iter().enumerate() {
            let rows = joined.entry((queued.work.layer, assigned.expert)).or_insert_with(|| Joined {
                experts: queued.work.experts.clone(),
                parts: Vec::new(),
                input: Vec::new(),
                output: Vec::new(),
            });
            rows.parts.push((request, index));
            for &row in &assigned.rows {
                let start = row as usize * width;
                rows.input.extend_from_slice(&queued.work.hidden[start..start + width]);
            }
        }
    }
    let mut jobs: Vec<ExpertJob<'_>> = joined
        .iter_mut()
        .filter_map(|((layer, expert), rows)| {
            rows.output.resize(rows.input.len(), 0.0);
            let expert = rows.experts.expert(*layer, *expert)?;
            Some(ExpertJob { expert, hidden: &rows.input, output: &mut rows.output })
        })
        .collect();
    run_experts(&mut jobs, pool);
    drop(jobs);

    let mut parts: Vec<Vec<&[f32]>> =
        batch.iter().map(|queued| vec![[].as_slice(); queued.work.assignments.len()]).collect();
    for rows in joined.values() {
        let mut rest = rows.output.as_slice();
        for &(request, index) in &rows.parts {
            let (own, others) = rest.split_at(batch[request].work.assignments[index].rows.len() * width);
            parts[request][index] = own;
            rest = others;
        }
    }
    let computed = started.elapsed();
    for (queued, parts) in batch.into_iter().zip(parts) {
        let values = match queued.work.combine {
            Combine::Client => parts.concat(),
            Combine::Peer => sum(&queued.work, &parts, width),
        };
        let done = Done { values, queued: started.saturating_duration_since(queued.since), computed };
        // The caller may have gone.
        let _ = queued.reply.send(Ok(done));
    }
}

/// The weighted sum of each row's experts, in ascending expert number.
fn sum(work: &Work, parts: &[&[f32]], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0; work.hidden.len()];
    for (assigned, values) in work.assignments.iter().zip(parts) {
        for ((&row, &weight), value) in assigned.rows.iter().zip(&assigned.weights).zip(values.chunks_exact(width)) {
            let start = row as usize * width;
            add_weighted(&mut sums[start..start + width], value, weight);
        }
    }
    sums
}
