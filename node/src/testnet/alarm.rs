//! A clock that is finer than the runtime's, which rounds up to milliseconds: with that a path of 20 ms took 22.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

/// Wakes up one task when a time has come. A thread of its own waits; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Alarm(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    rang: Notify,
}

#[derive(Debug, Default)]
struct State {
    due: Option<Instant>,
    ended: bool,
}

impl Alarm {
    /// # Errors
    /// The system has no thread left.
    pub(super) fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let alarm = Self(shared.clone());
        std::thread::Builder::new().name("alarm".into()).spawn(move || shared.run())?;
        Ok(alarm)
    }

    /// Returns when it is `due`. Who asks again gives the earlier question up; a dropped future may have the next one return too early.
    pub(super) async fn at(&self, due: Instant) {
        if due > Instant::now() {
            if self.0.lock().due != Some(due) {
                self.0.set(|state| state.due = Some(due));
            }
            self.0.rang.notified().await;
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.0.set(|state| state.ended = true);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            state = match state.due {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    self.changed.wait_timeout(state, due - now).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    state.due = None;
                    self.rang.notify_one();
                    state
                }
            };
        }
    }
}
