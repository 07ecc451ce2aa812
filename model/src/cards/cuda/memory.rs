//! Memory of a card, memory of the host that it copies from and to, and both together.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{result, sys};

use super::{Context, Error, Stream};
use crate::cards::panels::Piece;

/// What drivers round large allocations up to.
const GRAIN_BYTES: usize = 2 << 20;

/// Memory of a card. Not read before it was written.
#[derive(Debug)]
pub(in crate::cards) struct Memory {
    context: Arc<Context>,
    pub(super) at: sys::CUdeviceptr,
    bytes: usize,
    /// What the driver took for it.
    taken: u64,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // Memory of a card that is lost is gone anyway.
            // SAFETY: it was allocated once; the driver waits for launches that use it.
            let _ = unsafe { result::free_sync(self.at) };
        }
        self.context.held.fetch_sub(self.taken, Ordering::SeqCst);
    }
}

impl Memory {
    pub(in crate::cards) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let (before, _) = context.memory()?;
        // Counted from before it is taken until after it is free: whoever compares with what the card says never takes it for others'.
        let most = bytes.max(1).next_multiple_of(GRAIN_BYTES) as u64;
        context.held.fetch_add(most, Ordering::SeqCst);
        // SAFETY: dropping the value frees it.
        let at = unsafe { result::malloc_sync(bytes.max(1)) };
        let at = at.inspect_err(|_| _ = context.held.fetch_sub(most, Ordering::SeqCst))?;
        let mut memory = Self { context: Arc::clone(context), at, bytes, taken: most };
        let (after, _) = context.memory()?;
        // What other programs took or gave back between the two looks is not counted.
        memory.taken = before.saturating_sub(after).clamp(bytes as u64, most);
        context.held.fetch_sub(most - memory.taken, Ordering::SeqCst);
        Ok(memory)
    }

    pub(in crate::cards) fn address(&self) -> u64 {
        self.at
    }

    pub(in crate::cards) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is of the card of this context.
    pub(in crate::cards) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }
}

/// Memory of the host that a card copies from and to by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<Context>,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: it is owned memory.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: it was allocated once; whoever copies from it waits for the copy before it lets go.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        context.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: dropping the value frees it.
        let at: *mut u8 = unsafe { result::malloc_host(bytes, 0) }?.cast();
        // SAFETY: it was allocated with so many bytes.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Self { context: Arc::clone(context), at, bytes })
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and written with so many bytes, and borrowed with the value.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) }
    }
}

/// Memory of the host and as much of a card, to copy from one to the other.
#[derive(Debug)]
pub(in crate::cards) struct Mirror {
    pub(super) host: Pinned,
    pub(super) card: Memory,
}

impl Mirror {
    pub(in crate::cards) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        Ok(Self { host: Pinned::new(context, bytes)?, card: Memory::new(context, bytes)? })
    }

    /// What the card has of it.
    pub(in crate::cards) fn on_card(&self) -> &Memory {
        &self.card
    }

    /// What the host has of it.
    pub(in crate::cards) fn bytes(&mut self) -> &mut [u8] {
        self.host.bytes()
    }

    /// As floats; what is left of a whole number of them is not among them.
    pub(in crate::cards) fn floats(&mut self) -> &mut [f32] {
        let Pinned { at, bytes, .. } = self.host;
        // SAFETY: allocated and written with so many bytes, which the driver aligns to pages, and any bits are floats.
        unsafe { std::slice::from_raw_parts_mut(at.cast(), bytes / 4) }
    }
}

/// Hands weights over: while one piece is copied, the next is laid out.
#[derive(Debug)]
pub(in crate::cards) struct Upload([(Pinned, Stream); 2]);

impl Upload {
    /// For pieces of so many bytes; for larger ones there will be room when they come.
    pub(in crate::cards) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let buffer = || Ok((Pinned::new(context, bytes)?, Stream::new(context)?));
        Ok(Self([buffer()?, buffer()?]))
    }

    /// Has `write` write piece after piece, and copies them to where they belong in `memory`.
    pub(in crate::cards) fn copy(
        &mut self,
        pieces: &[Piece],
        write: impl Fn(&Piece, &mut [u8]),
        memory: &mut Memory,
    ) -> Result<(), Error> {
        for (number, piece) in pieces.iter().enumerate() {
            let (pinned, stream) = &mut self.0[number % 2];
            // The copy before the last, from the same buffer.
            stream.wait()?;
            if pinned.bytes().len() < piece.bytes {
                *pinned = Pinned::new(&memory.context, piece.bytes)?;
            }
            write(piece, &mut pinned.bytes()[..piece.bytes]);
            // SAFETY: the buffer is waited for before it is used or dropped, here and below, and the memory outlives this call.
            unsafe { stream.copy_to(pinned, piece.bytes, memory, piece.at)? };
        }
        self.0.iter_mut().try_for_each(|(_, stream)| stream.wait())
    }
}
