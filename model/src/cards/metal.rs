//! Metal, which drives the GPU of a machine by Apple. Host and GPU share one memory: what the host writes is where the GPU reads it, and
//! nothing is copied. Objects are freed when they are dropped; an error is the driver's word, and what that means is for others to say.
//!
//! Weights are found by addresses that the GPU reads in the table of groups, so all memory is in one residency set, which every command
//! buffer has: Metal sees no other use of it. What a launch writes and the next one reads is bound, and Metal keeps their order.

mod memory;

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) use memory::{Memory, Mirror, Upload};
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::{NSError, NSProcessInfo, NSString};
use objc2_metal::{
    MTLCommandBuffer, MTLCommandBufferStatus, MTLCommandEncoder, MTLCommandQueue, MTLCompileOptions,
    MTLComputeCommandEncoder, MTLComputePipelineState, MTLCreateSystemDefaultDevice, MTLDevice, MTLGPUFamily,
    MTLLanguageVersion, MTLLibrary, MTLMathFloatingPointFunctions, MTLMathMode, MTLResidencySet,
    MTLResidencySetDescriptor, MTLSize,
};

use crate::device::{CardReport, OpenError};

// Without this framework Metal shows no GPU to programs that draw nothing.
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

/// Threads of a simdgroup that the kernels are written for.
const SIMDGROUP: usize = 32;

/// What went wrong.
#[derive(Debug)]
pub(super) enum Error {
    /// There is no memory left.
    NoMemory,
    /// Anything else, in the driver's words.
    Failed(String),
}

impl From<&NSError> for Error {
    fn from(error: &NSError) -> Self {
        Self::Failed(error.localizedDescription().to_string())
    }
}

/// What the driver says is wrong.
pub(super) fn reason(error: Error) -> String {
    match error {
        Error::NoMemory => "there is no memory left".into(),
        Error::Failed(reason) => reason,
    }
}

/// Whether there is no memory left, and nothing else is wrong.
pub(super) fn is_out_of_memory(error: &Error) -> bool {
    matches!(error, Error::NoMemory)
}

/// What is made only where there is enough of something that Metal does not tell.
fn made<T>(what: &str, made: Option<T>) -> Result<T, Error> {
    made.ok_or_else(|| Error::Failed(format!("Metal makes no {what}")))
}

/// A GPU, before it is used.
#[derive(Debug)]
pub(super) struct Gpu(Retained<ProtocolObject<dyn MTLDevice>>);

/// The one GPU that such a machine has.
pub(super) fn gpus() -> Result<Vec<Gpu>, OpenError> {
    // With this came residency sets.
    if !objc2::available!(macos = 15.0, ios = 18.0, ..) {
        return Err(OpenError::OldSystem);
    }
    let device = autoreleasepool(|_| MTLCreateSystemDefaultDevice()).ok_or(OpenError::NoGpu)?;
    Ok(vec![Gpu(device)])
}

impl Gpu {
    /// As `--device` has it.
    pub(super) fn name(&self) -> String {
        "metal".into()
    }

    fn maker_name(&self) -> String {
        autoreleasepool(|_| self.0.name().to_string())
    }

    /// What no two GPUs of a machine have in common.
    pub(super) fn uuid(&self) -> Result<[u8; 16], Error> {
        Ok(u128::from(self.0.registryID()).to_be_bytes())
    }

    /// What Metal tells of it.
    pub(super) fn report(&self) -> Result<CardReport, Error> {
        // Families are numbered from 1001 on.
        let family = (1..100).rev().find(|number| self.0.supportsFamily(MTLGPUFamily(1000 + number)));
        let system = autoreleasepool(|_| NSProcessInfo::processInfo().operatingSystemVersion());
        Ok(CardReport {
            device: self.name(),
            name: self.maker_name(),
            uuid: self.uuid()?,
            kind: family.map_or_else(|| "not by Apple".into(), |number| format!("Apple family {number}")),
            memory: Ok(memory(&self.0)),
            driver: format!("macOS {}.{}", system.majorVersion, system.minorVersion),
        })
    }

    /// Begins to use it.
    ///
    /// # Errors
    /// [`OpenError::OldGpu`] or [`OpenError::Card`].
    pub(super) fn open(&self) -> Result<Arc<Context>, OpenError> {
        if !self.0.supportsFamily(MTLGPUFamily::Apple7) || !self.0.hasUnifiedMemory() {
            return Err(OpenError::OldGpu { gpu: self.maker_name() });
        }
        let failed = |error| OpenError::Card { device: self.name(), reason: reason(error) };
        Context::new(self.0.clone()).map_err(failed)
    }
}

/// Bytes that Metal recommends to take besides those that were taken, and in all. What other programs have of them it does not tell.
fn memory(device: &ProtocolObject<dyn MTLDevice>) -> (u64, u64) {
    let total = device.recommendedMaxWorkingSetSize();
    (total.saturating_sub(device.currentAllocatedSize() as u64), total)
}

/// A GPU in use.
#[derive(Debug)]
pub(super) struct Context {
    device: Retained<ProtocolObject<dyn MTLDevice>>,
    queue: Retained<ProtocolObject<dyn MTLCommandQueue>>,
    /// All memory that values of this module hold.
    residency: Mutex<Retained<ProtocolObject<dyn MTLResidencySet>>>,
}

// SAFETY: Metal lets any thread use devices and queues; the set is used by one at a time.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn new(device: Retained<ProtocolObject<dyn MTLDevice>>) -> Result<Arc<Self>, Error> {
        autoreleasepool(|_| {
            let queue = made("command queue", device.newCommandQueue())?;
            let residency = device.newResidencySetWithDescriptor_error(&MTLResidencySetDescriptor::new());
            let residency = residency.map_err(|error| Error::from(&*error))?;
            queue.addResidencySet(&residency);
            Ok(Arc::new(Self { device, queue, residency: Mutex::new(residency) }))
        })
    }

    /// Bytes of the GPU's memory that this process has.
    pub(super) fn held_bytes(&self) -> u64 {
        self.device.currentAllocatedSize() as u64
    }

    /// Bytes free at present, and in all.
    pub(super) fn memory(&self) -> Result<(u64, u64), Error> {
        Ok(memory(&self.device))
    }

    /// Changes what the GPU keeps at hand.
    fn change_residency(&self, change: impl FnOnce(&ProtocolObject<dyn MTLResidencySet>)) {
        let residency = self.residency.lock().unwrap_or_else(PoisonError::into_inner);
        change(&residency);
        residency.commit();
        residency.requestResidency();
    }
}

/// A command buffer that is being written, and what writes it.
type Open = (Retained<ProtocolObject<dyn MTLCommandBuffer>>, Retained<ProtocolObject<dyn MTLComputeCommandEncoder>>);

/// A queue of launches, done one after the other.
#[derive(Debug)]
pub(super) struct Stream {
    context: Arc<Context>,
    open: Option<Open>,
    running: Option<Retained<ProtocolObject<dyn MTLCommandBuffer>>>,
}

// SAFETY: a command buffer and its encoder may be used by any thread, one at a time.
unsafe impl Send for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        // Whoever wanted to know has waited.
        let _ = self.wait();
    }
}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Ok(Self { context: Arc::clone(context), open: None, running: None })
    }

    /// Waits until all that was asked for is done. What was launched without [`Self::fetch`] is not done at all.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        if let Some((_, encoder)) = self.open.take() {
            encoder.endEncoding();
        }
        let Some(commands) = self.running.take() else { return Ok(()) };
        autoreleasepool(|_| {
            commands.waitUntilCompleted();
            if commands.status() == MTLCommandBufferStatus::Completed {
                return Ok(());
            }
            let unknown = || Error::Failed("a command buffer was not completed".into());
            Err(commands.error().map_or_else(unknown, |error| Error::from(&*error)))
        })
    }

    /// Has the GPU see the first `bytes`: the host wrote them where it reads.
    ///
    /// # Safety
    /// Nobody may use `mirror` before [`Self::wait`] has returned.
    pub(super) unsafe fn send(&mut self, _mirror: &mut Mirror, _bytes: usize) -> Result<(), Error> {
        Ok(())
    }

    /// Has the host see the first `bytes` once [`Self::wait`] has returned; the last of some work, which begins here.
    ///
    /// # Safety
    /// Nobody may use `mirror` before [`Self::wait`] has returned.
    pub(super) unsafe fn fetch(&mut self, _mirror: &mut Mirror, _bytes: usize) -> Result<(), Error> {
        // The work before is done, as a slot is waited for before it is used again; its error would be heard of here.
        debug_assert!(self.running.is_none());
        if let Some((commands, encoder)) = self.open.take() {
            encoder.endEncoding();
            commands.commit();
            self.running = Some(commands);
        }
        Ok(())
    }

    fn encoder(&mut self) -> Result<&ProtocolObject<dyn MTLComputeCommandEncoder>, Error> {
        if self.open.is_none() {
            let commands = made("command buffer", self.context.queue.commandBuffer())?;
            let encoder = made("command encoder", commands.computeCommandEncoder())?;
            self.open = Some((commands, encoder));
        }
        made("command encoder", self.open.as_ref().map(|(_, encoder)| &**encoder))
    }

    /// Launches a kernel over `groups` groups, of which the first is at `first`: for their gate and up, or for their down.
    ///
    /// # Safety
    /// What the groups name must be in the GPU's memory: whole panels, rows at `input` that were written, and room for rows at
    /// `output`; all of it until [`Self::wait`] has returned.
    pub(super) unsafe fn launch(
        &mut self,
        kernel: &Kernel,
        (blocks, threads): (u32, u32),
        (first, groups): (At<'_>, usize),
        (input, output): (At<'_>, At<'_>),
        is_down: bool,
    ) -> Result<(), Error> {
        if threads as usize > kernel.0.maxTotalThreadsPerThreadgroup() {
            return Err(Error::Failed(format!("a kernel does not run with {threads} threads")));
        }
        autoreleasepool(|_| {
            let encoder = self.encoder()?;
            encoder.setComputePipelineState(&kernel.0);
            for (argument, (memory, at)) in [(0, first), (2, input), (3, output)] {
                // SAFETY: the place is within the buffer, and the kernels read it so.
                unsafe { encoder.setBuffer_offset_atIndex(Some(memory.buffer()), at, argument) };
            }
            for (argument, value) in [(1, groups as u32), (4, u32::from(is_down))] {
                let bytes = NonNull::from(&value).cast::<c_void>();
                // SAFETY: it is so long, and copied before this returns.
                unsafe { encoder.setBytes_length_atIndex(bytes, size_of::<u32>(), argument) };
            }
            let line = |width: u32| MTLSize { width: width as usize, height: 1, depth: 1 };
            encoder.dispatchThreadgroups_threadsPerThreadgroup(line(blocks), line(threads));
            Ok(())
        })
    }
}

/// A place in the GPU's memory, by its byte.
pub(super) type At<'a> = (&'a Memory, usize);

/// The kernels, compiled.
#[derive(Debug)]
pub(super) struct Module {
    context: Arc<Context>,
    library: Retained<ProtocolObject<dyn MTLLibrary>>,
}

/// A kernel.
#[derive(Debug)]
pub(super) struct Kernel(Retained<ProtocolObject<dyn MTLComputePipelineState>>);

impl Module {
    /// Has the system compile the kernels.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        autoreleasepool(|_| {
            let options = MTLCompileOptions::new();
            options.setLanguageVersion(MTLLanguageVersion::Version3_2);
            // Nothing may be reordered or approximated.
            options.setMathMode(MTLMathMode::Safe);
            options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
            let source = NSString::from_str(super::METAL);
            let library = context.device.newLibraryWithSource_options_error(&source, Some(&options));
            let library = library.map_err(|error| Error::from(&*error))?;
            Ok(Self { context: Arc::clone(context), library })
        })
    }

    /// A kernel by its name.
    pub(super) fn kernel(&self, name: &str) -> Result<Kernel, Error> {
        autoreleasepool(|_| {
            let function = made(name, self.library.newFunctionWithName(&NSString::from_str(name)))?;
            let pipeline = self.context.device.newComputePipelineStateWithFunction_error(&function);
            let pipeline = pipeline.map_err(|error| Error::from(&*error))?;
            match pipeline.threadExecutionWidth() {
                SIMDGROUP => Ok(Kernel(pipeline)),
                other => Err(Error::Failed(format!("a simdgroup has {other} threads, not {SIMDGROUP}"))),
            }
        })
    }
}
