//! What a call allocates on both sides does not grow with its rows, but for the packets they fill.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use hanse_model::Routing;
use hanse_router::{ExpertNetwork, Usage};
use hanse_tests::net::{Net, runtime};
use hanse_tests::reference::tiny_moe;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counting.
struct Counting;

// SAFETY: every call is handed to the system's allocator as it is; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` above, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls that count.
const CALLS: usize = 101;

/// The median number of allocations of the whole process, client and volunteer, during a call of `rows` rows to one expert.
async fn allocations(network: &ExpertNetwork, rows: usize) -> u64 {
    let width = network.directory().layout().hidden_size as usize;
    let hidden: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect();
    let routing = Routing { top_k: 1, experts: vec![0; rows], weights: vec![1.0; rows] };
    let mut counts = Vec::new();
    let mut usage = Usage::default();
    for _ in 0..CALLS {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        network.forward(0, &hidden, &routing, &mut usage).await.unwrap();
        counts.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
    counts.sort_unstable();
    counts[CALLS / 2]
}

#[test]
fn a_call_allocates_nothing_per_row() {
    runtime().block_on(async {
        let net = Net::start(&tiny_moe(), &["0-5:0-15"]).await;
        let client = net.client().await;
        let network = client.network().unwrap();
        // Windows grow, buffers reach their size.
        allocations(network, 512).await;
        let (one, few, many) =
            (allocations(network, 1).await, allocations(network, 64).await, allocations(network, 512).await);
        println!("allocations of a call on both sides: 1 row {one}, 64 rows {few}, 512 rows {many}");
        // QUIC keeps books of packets, of which each carries several rows there and back. One allocation for each row in our own code, on either side,
        // would be one more.
        let per_row = (many - few) as f64 / (512 - 64) as f64;
        assert!(per_row < 1.0, "{per_row} allocations for each row more");
    });
}
