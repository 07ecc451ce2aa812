//! What becomes of the memory of large calls.

/// Blocks from so many bytes on, such as answers to prompts, are the system's again as soon as they are freed. glibc would keep them for later: it
/// raises the limit, 128 KiB at first, to the size of whatever is freed. Smaller ones come and go too often to be worth the page faults.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: libc::c_int = 4 << 20;

/// A node is one of many programs on a volunteer's machine: what a large call took is not kept after it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) fn give_large_blocks_back() {
    // SAFETY: it sets a parameter of the allocator, under the allocator's own lock. Where it is refused, all is as it was.
    let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

/// Other allocators do so by themselves, or cannot be told.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn give_large_blocks_back() {}
