//! Where the data plane runs: threads of its own, few of them.
//!
//! A request passes through three tasks on its way in: one that reads the socket, one of its connection, and one that answers. On one
//! thread they follow each other; over several, each wakes another core up to run the next, and calls of 16 rows take a tenth longer. Apart
//! from everything else, as what occupies a thread of the control plane for a moment keeps no answer waiting.

use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};

/// Cores for each thread: one carries 2 Gbit/s and more, which is more than most members have.
const CORES_PER_THREAD: usize = 4;

/// Where connections have a lot to send, there is always a task to go on with. Every second one is taken from those that other threads have
/// woken up, and after eight the sockets are looked at; tokio would do so after 61, or after what it thinks takes 200 us. The latest of
/// sixteen clients' calls of 64 rows took 175 ms in place of 629 on a busy machine.
const OTHERS: u32 = 2;
const SOCKETS: u32 = 8;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / CORES_PER_THREAD).max(1);
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name("hanse-data").enable_all();
    builder.global_queue_interval(OTHERS).event_interval(SOCKETS);
    builder.build().expect("the system has room for a thread")
});

/// The runtime of all data connections of this process. What is spawned on it must not occupy its thread.
#[must_use]
pub fn data_runtime() -> &'static Handle {
    RUNTIME.handle()
}
