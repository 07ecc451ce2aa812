//! Sharing out tasks over the threads of a pool.
//!
//! The caller works too and starts at once. Threads of the pool join as they wake up, and those that come too late are not
//! waited for: a piece of work that takes less time than waking a thread takes no longer than in one thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::ThreadPool;

/// Rounds of a loop that waits before it lets other threads have the core.
const SPINS: usize = 200;

/// Calls to threads that have not come yet, over all pools: beyond this, threads are busy and need no more calls.
const MOST_CALLS: usize = 256;

static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Set in [`Shared::inside`] when nobody may come in any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// Good for those who are inside.
    task: *const Task<'static>,
    count: usize,
    /// The next task to take.
    next: AtomicUsize,
    /// Threads of the pool that may call `task`, and [`CLOSED`].
    inside: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` is `Sync`, and is only used while the caller of `share` waits.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Runs `task` for every number below `count`, in this thread and in threads of the pool, as many in all as the pool has.
/// Numbers are taken in ascending order, so that a task may wait for one with a lower number, which then is done or has a
/// thread of its own.
///
/// # Panics
/// If a task panics; when all others are done or given up.
pub(crate) fn share(count: usize, pool: &ThreadPool, task: &Task<'_>) {
    let helpers = pool.current_num_threads().min(count).saturating_sub(1);
    // SAFETY: only the lifetime changes. Whoever uses the pointer is inside, and this function does not end, nor unwind,
    // before everybody is out.
    let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
    let shared = Arc::new(Shared {
        task,
        count,
        next: AtomicUsize::new(0),
        inside: AtomicUsize::new(0),
        panic: Mutex::default(),
    });
    for _ in 0..helpers {
        if CALLS.load(Ordering::Relaxed) >= MOST_CALLS {
            break;
        }
        CALLS.fetch_add(1, Ordering::Relaxed);
        let shared = shared.clone();
        pool.spawn(move || {
            CALLS.fetch_sub(1, Ordering::Relaxed);
            if shared.enter() {
                shared.work();
                shared.inside.fetch_sub(1, Ordering::Release);
            }
        });
    }
    shared.work();
    shared.inside.fetch_or(CLOSED, Ordering::Acquire);
    wait_until(|| shared.inside.load(Ordering::Acquire) == CLOSED);
    let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

impl Shared {
    fn enter(&self) -> bool {
        let open = |inside| (inside & CLOSED == 0).then_some(inside + 1);
        self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, open).is_ok()
    }

    /// Takes tasks until there are none.
    fn work(&self) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                if number >= self.count {
                    break;
                }
                // SAFETY: the caller of `share` is in this function, or waits for the thread that is.
                unsafe { (*self.task)(number) };
            }
        }));
        if let Err(panic) = result {
            self.next.store(self.count, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

/// Tasks of a group that are not done yet.
#[derive(Debug)]
pub(crate) struct Pending(AtomicUsize);

impl Pending {
    pub(crate) fn new(tasks: usize) -> Self {
        Self(AtomicUsize::new(tasks))
    }

    /// Counts a task as done when the result is dropped, also by a panic, so that nobody waits for ever.
    pub(crate) fn task(&self) -> impl Drop + '_ {
        struct Done<'a>(&'a AtomicUsize);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Release);
            }
        }
        Done(&self.0)
    }

    /// Waits until all are done. What they wrote can be read then.
    pub(crate) fn wait(&self) {
        wait_until(|| self.0.load(Ordering::Acquire) == 0);
    }
}

fn wait_until(ready: impl Fn() -> bool) {
    let mut rounds = 0;
    while !ready() {
        rounds += 1;
        if rounds < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute_pool;

    #[test]
    fn every_task_runs_once_and_sees_what_the_group_before_it_wrote() {
        for threads in [1, 2, 5] {
            let pool = compute_pool(threads).unwrap();
            for count in [0, 1, 3, 100] {
                let (first, second): (Vec<_>, Vec<_>) =
                    (0..count).map(|_| <(AtomicUsize, AtomicUsize)>::default()).unzip();
                let pending = Pending::new(count);
                share(2 * count, &pool, &|number| {
                    if number < count {
                        let _done = pending.task();
                        first[number].fetch_add(number + 1, Ordering::Relaxed);
                    } else {
                        pending.wait();
                        let sum: usize = first.iter().map(|value| value.load(Ordering::Relaxed)).sum();
                        second[number - count].fetch_add(sum, Ordering::Relaxed);
                    }
                });
                let expected = count * (count + 1) / 2;
                assert!(second.iter().all(|sum| sum.load(Ordering::Relaxed) == expected), "{threads} threads, {count}");
            }
        }
    }

    #[test]
    fn nobody_waits_for_threads_that_are_busy_elsewhere() {
        let pool = compute_pool(2).unwrap();
        let busy = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..2 {
            let busy = busy.clone();
            pool.spawn(move || {
                busy.wait();
            });
        }
        let done = AtomicUsize::new(0);
        share(10, &pool, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 10);
        busy.wait();
    }

    #[test]
    fn a_panic_comes_to_the_caller_and_leaves_the_pool_usable() {
        let pool = compute_pool(3).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            share(50, &pool, &|number| assert!(number != 20, "task 20"));
        }));
        assert!(panicked.is_err());
        let done = AtomicUsize::new(0);
        share(50, &pool, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 50);
    }
}
