//! NVIDIA's driver, opened at run time. Its objects are freed when they are dropped; an error is its word, and what that means is for
//! others to say.

mod memory;

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) use cudarc::driver::result::DriverError as Error;
use cudarc::driver::{result, sys};

use memory::Pinned;
pub(super) use memory::{Memory, Mirror, Upload};

use crate::device::{CardReport, OpenError, version};

/// The oldest CUDA whose driver reads the kernels.
const OLDEST_CUDA: i32 = 11_080;
/// The oldest cards that the kernels are compiled for.
const OLDEST_CAPABILITY: (i32, i32) = (6, 0);

/// What the driver says is wrong.
pub(super) fn reason(error: Error) -> String {
    let text = |found: Result<&std::ffi::CStr, Error>| {
        found.map_or_else(|_| String::new(), |text| text.to_string_lossy().into())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

/// Whether there is no memory left, and nothing else is wrong.
pub(super) fn is_out_of_memory(error: &Error) -> bool {
    error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

/// A card, before it is used: its number for the driver.
#[derive(Debug)]
pub(super) struct Gpu(u32);

/// Starts the driver; returns the cards that it shows, by their numbers.
pub(super) fn gpus() -> Result<Vec<Gpu>, OpenError> {
    // SAFETY: it only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoDriver);
    }
    let failed = |error| OpenError::Driver { reason: reason(error) };
    result::init().map_err(failed)?;
    let found = newest_cuda().map_err(failed)?;
    if found < OLDEST_CUDA {
        return Err(OpenError::OldDriver { found });
    }
    let cards = result::device::get_count().map_err(failed)?;
    Ok((0..u32::try_from(cards).unwrap_or(0)).map(Gpu).collect())
}

/// The newest CUDA that the driver knows.
fn newest_cuda() -> Result<i32, Error> {
    let mut found = 0;
    // SAFETY: the pointer is valid.
    unsafe { sys::cuDriverGetVersion(&mut found) }.result()?;
    Ok(found)
}

impl Gpu {
    /// As `--device` has it.
    pub(super) fn name(&self) -> String {
        format!("cuda:{}", self.0)
    }

    fn device(&self) -> Result<sys::CUdevice, Error> {
        result::device::get(c_int::try_from(self.0).unwrap_or(c_int::MAX))
    }

    fn capability(&self) -> Result<(i32, i32), Error> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let device = self.device()?;
        // SAFETY: the device comes from the driver.
        unsafe { Ok((result::device::get_attribute(device, MAJOR)?, result::device::get_attribute(device, MINOR)?)) }
    }

    /// What no two cards, or parts of a card, have in common; the order in which they are shown changes nothing of it.
    pub(super) fn uuid(&self) -> Result<[u8; 16], Error> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // The first version gives parts of a card the UUID of the whole.
        // SAFETY: the pointer is valid, and the device comes from the driver.
        unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.device()?) }.result()?;
        // `c_char` is signed on some machines.
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// What the driver tells of it.
    pub(super) fn report(&self) -> Result<CardReport, Error> {
        let (major, minor) = self.capability()?;
        Ok(CardReport {
            device: self.name(),
            name: result::device::get_name(self.device()?)?,
            uuid: self.uuid()?,
            kind: format!("compute capability {major}.{minor}"),
            memory: Context::new(self).and_then(|context| context.memory()).map_err(reason),
            driver: format!("the driver knows CUDA {}", version(newest_cuda()?)),
        })
    }

    /// Begins to use it.
    ///
    /// # Errors
    /// [`OpenError::OldCard`] or [`OpenError::Card`].
    pub(super) fn open(&self) -> Result<Arc<Context>, OpenError> {
        let failed = |error| OpenError::Card { device: self.name(), reason: reason(error) };
        let capability = self.capability().map_err(failed)?;
        if capability < OLDEST_CAPABILITY {
            return Err(OpenError::OldCard { card: self.0, capability });
        }
        Context::new(self).map_err(failed)
    }
}

/// A card in use.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    /// Bytes of its memory that values of this module hold.
    held: AtomicU64,
}

// SAFETY: the driver lets any thread use a context.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // A card that is lost is not there to be given back.
        // SAFETY: it was retained once.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Context {
    fn new(gpu: &Gpu) -> Result<Arc<Self>, Error> {
        let device = gpu.device()?;
        // SAFETY: the device comes from the driver; dropping the value releases the context.
        let raw = unsafe { result::primary_ctx::retain(device) }?;
        Ok(Arc::new(Self { device, raw, held: AtomicU64::new(0) }))
    }

    /// Bytes of the card's memory that are allocated in it, as much as the driver took for them; what the driver needs for itself is
    /// not among them.
    pub(super) fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }

    /// Has what this thread asks of the driver be meant for this card.
    fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context lives.
        unsafe { result::ctx::set_current(self.raw) }
    }

    /// Bytes free at present, and in all.
    pub(super) fn memory(&self) -> Result<(u64, u64), Error> {
        self.bind()?;
        result::mem_get_info().map(|(free, total)| (free as u64, total as u64))
    }
}

/// A queue of copies and launches, done one after the other.
#[derive(Debug)]
pub(super) struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: the driver lets any thread use a stream.
unsafe impl Send for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: it was created once.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        context.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Waits until all that was asked for is done.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }
    }

    /// Copies the first `bytes` to `to` from byte `at` on.
    ///
    /// # Safety
    /// Nobody may write to `from` or drop it or `to` before [`Self::wait`] has returned.
    unsafe fn copy_to(&self, from: &mut Pinned, bytes: usize, to: &Memory, at: usize) -> Result<(), Error> {
        self.context.bind()?;
        assert!(at.checked_add(bytes).is_some_and(|end| end <= to.bytes()), "a copy within the card's memory");
        // SAFETY: both are long enough, and live long enough as the caller promises.
        unsafe { result::memcpy_htod_async(to.at + at as u64, &from.bytes()[..bytes], self.raw) }
    }

    /// Copies the first `bytes` to the card.
    ///
    /// # Safety
    /// Nobody may use `mirror` before [`Self::wait`] has returned.
    pub(super) unsafe fn send(&mut self, mirror: &mut Mirror, bytes: usize) -> Result<(), Error> {
        // SAFETY: as the caller promises.
        unsafe { self.copy_to(&mut mirror.host, bytes, &mirror.card, 0) }
    }

    /// Copies the first `bytes` from the card; the last of some work, which begins here at the latest.
    ///
    /// # Safety
    /// Nobody may use `mirror` before [`Self::wait`] has returned.
    pub(super) unsafe fn fetch(&mut self, mirror: &mut Mirror, bytes: usize) -> Result<(), Error> {
        self.context.bind()?;
        assert!(bytes <= mirror.card.bytes(), "a copy from within the card's memory");
        // SAFETY: both are long enough, and live long enough as the caller promises.
        unsafe { result::memcpy_dtoh_async(&mut mirror.host.bytes()[..bytes], mirror.card.at, self.raw) }
    }

    /// Launches a kernel over `groups` groups, of which the first is at `first`: for their gate and up, or for their down.
    ///
    /// # Safety
    /// What the groups name must be in the card's memory: whole panels, rows at `input` that were written, and room for rows at
    /// `output`; all of it until [`Self::wait`] has returned.
    pub(super) unsafe fn launch(
        &mut self,
        kernel: &Kernel,
        (blocks, threads): (u32, u32),
        (first, groups): (At<'_>, usize),
        (input, output): (At<'_>, At<'_>),
        is_down: bool,
    ) -> Result<(), Error> {
        self.context.bind()?;
        let address = |(memory, at): At<'_>| memory.at + at as u64;
        let (mut first, mut input, mut output) = (address(first), address(input), address(output));
        let (mut count, mut is_down) = (groups as u32, u32::from(is_down));
        let mut arguments: [*mut c_void; 5] = [
            (&raw mut first).cast(),
            (&raw mut count).cast(),
            (&raw mut input).cast(),
            (&raw mut output).cast(),
            (&raw mut is_down).cast(),
        ];
        // SAFETY: the kernels take these five arguments, which the driver reads before it returns.
        unsafe { result::launch_kernel(kernel.raw, (blocks, 1, 1), (threads, 1, 1), 0, self.raw, &mut arguments) }
    }
}

/// A place in a card's memory, by its byte.
pub(super) type At<'a> = (&'a Memory, usize);

/// The kernels on a card.
#[derive(Debug)]
pub(super) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: the driver lets any thread use a module.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: it was loaded once, and kernels are dropped with it or before.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}

/// A kernel; good for as long as its [`Module`] lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    raw: sys::CUfunction,
}

// SAFETY: the driver lets any thread launch a kernel.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Module {
    /// Has the driver translate the kernels.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, Error> {
        context.bind()?;
        let ptx = CString::new(super::PTX).unwrap_or_default();
        // SAFETY: it is text that ends in a zero byte.
        let raw = unsafe { result::module::load_data(ptx.as_ptr().cast()) }?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// A kernel by its name.
    pub(super) fn kernel(&self, name: &str) -> Result<Kernel, Error> {
        self.context.bind()?;
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module lives.
        let raw = unsafe { result::module::get_function(self.raw, name) }?;
        Ok(Kernel { raw })
    }
}
