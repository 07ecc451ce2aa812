//! Memory that host and GPU share.

use std::sync::Arc;

use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLBuffer, MTLDevice, MTLResidencySet, MTLResourceOptions};

use super::{Context, Error};
use crate::cards::panels::Piece;

/// Memory of the GPU. Not read before it was written.
#[derive(Debug)]
pub(in crate::cards) struct Memory {
    context: Arc<Context>,
    buffer: Retained<ProtocolObject<dyn MTLBuffer>>,
    bytes: usize,
}

// SAFETY: it is owned memory, and Metal lets any thread use a buffer.
unsafe impl Send for Memory {}
// SAFETY: nothing is changed through a shared reference.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        self.context.change_residency(|set| set.removeAllocation(ProtocolObject::from_ref(&*self.buffer)));
    }
}

impl Memory {
    pub(in crate::cards) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let device = &context.device;
        if bytes > device.maxBufferLength() {
            return Err(Error::NoMemory);
        }
        let shared = MTLResourceOptions::StorageModeShared;
        let buffer = autoreleasepool(|_| device.newBufferWithLength_options(bytes.max(1), shared));
        let buffer = buffer.ok_or(Error::NoMemory)?;
        context.change_residency(|set| set.addAllocation(ProtocolObject::from_ref(&*buffer)));
        Ok(Self { context: Arc::clone(context), buffer, bytes })
    }

    pub(super) fn buffer(&self) -> &ProtocolObject<dyn MTLBuffer> {
        &self.buffer
    }

    pub(in crate::cards) fn address(&self) -> u64 {
        self.buffer.gpuAddress()
    }

    pub(in crate::cards) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is of the GPU of this context.
    pub(in crate::cards) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    /// What is in it.
    fn contents(&mut self) -> &mut [u8] {
        // SAFETY: shared memory of so many bytes, borrowed with the value; the GPU uses it only while its owner waits
        // (`Stream::launch`).
        unsafe { std::slice::from_raw_parts_mut(self.buffer.contents().as_ptr().cast(), self.bytes) }
    }
}

/// Memory that the host writes and reads between two launches.
#[derive(Debug)]
pub(in crate::cards) struct Mirror(Memory);

impl Mirror {
    pub(in crate::cards) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        let mut memory = Memory::new(context, bytes)?;
        memory.contents().fill(0);
        Ok(Self(memory))
    }

    /// What the GPU has of it.
    pub(in crate::cards) fn on_card(&self) -> &Memory {
        &self.0
    }

    /// What the host has of it.
    pub(in crate::cards) fn bytes(&mut self) -> &mut [u8] {
        self.0.contents()
    }

    /// As floats; what is left of a whole number of them is not among them.
    pub(in crate::cards) fn floats(&mut self) -> &mut [f32] {
        let bytes = self.0.contents();
        // SAFETY: Metal aligns to pages, and any bits are floats.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<f32>()) }
    }
}

/// Hands weights over: they are laid out where they stay.
#[derive(Debug)]
pub(in crate::cards) struct Upload;

impl Upload {
    pub(in crate::cards) fn new(_context: &Arc<Context>, _bytes: usize) -> Result<Self, Error> {
        Ok(Self)
    }

    /// Has `write` write piece after piece to where they belong in `memory`.
    pub(in crate::cards) fn copy(
        &mut self,
        pieces: &[Piece],
        write: impl Fn(&Piece, &mut [u8]),
        memory: &mut Memory,
    ) -> Result<(), Error> {
        pieces.iter().for_each(|piece| write(piece, &mut memory.contents()[piece.at..][..piece.bytes]));
        Ok(())
    }
}
