//! Being told to end: by ctrl-C, or by the system.

use std::io;

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
#[cfg(windows)]
use tokio::signal::windows::{CtrlC, ctrl_c};

/// Ctrl-C, caught as long as this process lives: one that is pressed while nobody waits is kept for the next who does.
#[derive(Debug)]
pub(crate) struct Interrupts(#[cfg(unix)] Signal, #[cfg(windows)] CtrlC);

impl Interrupts {
    /// # Errors
    /// If the system does not let ctrl-C be caught.
    pub(crate) fn catch() -> io::Result<Self> {
        #[cfg(unix)]
        let caught = signal(SignalKind::interrupt())?;
        #[cfg(windows)]
        let caught = ctrl_c()?;
        Ok(Self(caught))
    }

    /// Completes when ctrl-C is pressed, or was since the last time.
    pub(crate) async fn next(&mut self) {
        // There is always a next one: the runtime holds the other end.
        self.0.recv().await;
    }

    /// Forgets what was pressed until now.
    pub(crate) fn forget(&mut self) {
        let _ = futures::FutureExt::now_or_never(self.0.recv());
    }
}

/// Completes when this process is told to end, with the word for how. From the call on the system's signals are caught, so that none is
/// lost before somebody waits.
///
/// # Errors
/// If the system does not let signals be caught.
pub(crate) fn told_to_end() -> io::Result<impl Future<Output = &'static str>> {
    let mut interrupts = Interrupts::catch()?;
    #[cfg(unix)]
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        #[cfg(unix)]
        let terminated = terminate.recv();
        #[cfg(not(unix))]
        let terminated = std::future::pending::<Option<()>>();
        tokio::select! {
            () = interrupts.next() => "interrupted",
            _ = terminated => "terminated",
        }
    })
}
