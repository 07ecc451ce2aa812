//! The allocator, and when it gives memory back.

use std::time::Duration;

/// Bodies of calls are blocks of hundreds of kilobytes that come and go: glibc gives each back to the system and takes new pages for the
/// next, which took more than a third of a call's time. This one keeps them for a second.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// For so long the allocator keeps what is free (`mi_option_purge_delay`).
const KEPT: Duration = Duration::from_secs(1);

/// Gives back what was kept for long enough, also where nothing is asked of the allocator any more, which looks only then: a node is one of
/// many programs on a volunteer's machine, and what a prompt took is not kept after it.
pub(crate) async fn give_back() {
    loop {
        tokio::time::sleep(KEPT).await;
        // SAFETY: it may be called at any time; what is in use stays.
        unsafe { libmimalloc_sys::mi_collect(false) };
    }
}
