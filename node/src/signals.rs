//! Being told to end: by ctrl-C, or by the system.

/// Completes when this process is told to end, with the word for how. From the call on the system's signal is caught, so that none is
/// lost before somebody waits.
///
/// # Errors
/// If the system does not let signals be caught.
pub(crate) fn told_to_end() -> std::io::Result<impl Future<Output = &'static str>> {
    #[cfg(unix)]
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    Ok(async move {
        #[cfg(unix)]
        let terminated = terminate.recv();
        #[cfg(not(unix))]
        let terminated = std::future::pending::<Option<()>>();
        tokio::select! {
            _ = tokio::signal::ctrl_c() => "interrupted",
            _ = terminated => "terminated",
        }
    })
}
