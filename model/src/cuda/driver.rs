//! The driver's objects, each freed when it is dropped. An error is the driver's word; what it means is for others to say.

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::plan::Group;
use crate::device::OpenError;

/// The oldest CUDA whose driver reads the kernels.
const OLDEST_CUDA: i32 = 11_080;
/// What drivers round large allocations up to.
const GRAIN_BYTES: usize = 2 << 20;

/// What the driver says is wrong.
pub(super) fn reason(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| String::new(), |text| text.to_string_lossy().into())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

/// Starts the driver; returns the newest CUDA that it knows, and how many cards it shows.
pub(super) fn start() -> Result<(i32, usize), OpenError> {
    // SAFETY: it only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoDriver);
    }
    let failed = |error| OpenError::Driver { reason: reason(error) };
    let mut found = 0;
    result::init().map_err(failed)?;
    // SAFETY: the pointer is valid.
    unsafe { sys::cuDriverGetVersion(&mut found) }.result().map_err(failed)?;
    if found < OLDEST_CUDA {
        return Err(OpenError::OldDriver { found });
    }
    let cards = result::device::get_count().map_err(failed)?;
    Ok((found, usize::try_from(cards).unwrap_or(0)))
}

/// A card, before it is used: its number for the driver, its name, and its compute capability.
pub(super) fn look(card: u32) -> Result<(sys::CUdevice, String, (i32, i32)), DriverError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let device = result::device::get(c_int::try_from(card).unwrap_or(c_int::MAX))?;
    // SAFETY: the device comes from the driver.
    let capability =
        unsafe { (result::device::get_attribute(device, MAJOR)?, result::device::get_attribute(device, MINOR)?) };
    Ok((device, result::device::get_name(device)?, capability))
}

/// What no two cards, or parts of a card, have in common; the order in which they are shown changes nothing of it.
pub(super) fn uuid(device: sys::CUdevice) -> Result<[u8; 16], DriverError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // The first version gives parts of a card the UUID of the whole.
    // SAFETY: the pointer is valid, and the device comes from the driver.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.result()?;
    // `c_char` is signed on some machines.
    Ok(uuid.bytes.map(|byte| byte as u8))
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
    pub(super) fn new(device: sys::CUdevice) -> Result<Arc<Self>, DriverError> {
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
    pub(super) fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives.
        unsafe { result::ctx::set_current(self.raw) }
    }

    /// Bytes free at present, and in all.
    pub(super) fn memory(&self) -> Result<(u64, u64), DriverError> {
        self.bind()?;
        result::mem_get_info().map(|(free, total)| (free as u64, total as u64))
    }
}

/// Memory of a card. Not read before it was written.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<Context>,
    at: sys::CUdeviceptr,
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
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, DriverError> {
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

    pub(super) fn address(&self) -> u64 {
        self.at
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is of the card of this context.
    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
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
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, DriverError> {
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

    /// As floats; what is left of a whole number of them is not among them.
    pub(super) fn floats(&mut self) -> &mut [f32] {
        // SAFETY: the driver aligns to pages, and any bits are floats.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes / 4) }
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
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DriverError> {
        context.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// Waits until all that was asked for is done.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        self.context.bind()?;
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }
    }

    /// Copies the first `bytes` to `to` from byte `at` on.
    ///
    /// # Safety
    /// Nobody may write to `from` or drop it or `to` before [`Self::wait`] has returned.
    pub(super) unsafe fn copy_to(
        &self,
        from: &mut Pinned,
        bytes: usize,
        to: &Memory,
        at: usize,
    ) -> Result<(), DriverError> {
        self.context.bind()?;
        assert!(at.checked_add(bytes).is_some_and(|end| end <= to.bytes), "a copy within the card's memory");
        // SAFETY: both are long enough, and live long enough as the caller promises.
        unsafe { result::memcpy_htod_async(to.at + at as u64, &from.bytes()[..bytes], self.raw) }
    }

    /// Copies the first `bytes` of `from` to the beginning of `to`.
    ///
    /// # Safety
    /// Nobody may use `to` or drop either before [`Self::wait`] has returned.
    pub(super) unsafe fn copy_from(&self, from: &Memory, bytes: usize, to: &mut Pinned) -> Result<(), DriverError> {
        self.context.bind()?;
        assert!(bytes <= from.bytes, "a copy from within the card's memory");
        // SAFETY: both are long enough, and live long enough as the caller promises.
        unsafe { result::memcpy_dtoh_async(&mut to.bytes()[..bytes], from.at, self.raw) }
    }

    /// Launches a kernel over `groups` groups, of which the first is at the address `first`: for their gate and up, or for their down.
    ///
    /// # Safety
    /// What the groups name must be in the card's memory: whole panels, rows at `input` that were written, and room for rows at
    /// `output`; all of it until [`Self::wait`] has returned.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Kernel,
        (blocks, threads): (u32, u32),
        (mut first, groups): (u64, usize),
        (mut input, mut output): (u64, u64),
        is_down: bool,
    ) -> Result<(), DriverError> {
        self.context.bind()?;
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
    /// Has the driver translate PTX.
    pub(super) fn new(context: &Arc<Context>, ptx: &CString) -> Result<Self, DriverError> {
        context.bind()?;
        // SAFETY: it is text that ends in a zero byte.
        let raw = unsafe { result::module::load_data(ptx.as_ptr().cast()) }?;
        Ok(Self { context: Arc::clone(context), raw })
    }

    /// A kernel by its name.
    pub(super) fn kernel(&self, name: CString) -> Result<Kernel, DriverError> {
        self.context.bind()?;
        // SAFETY: the module lives.
        let raw = unsafe { result::module::get_function(self.raw, name) }?;
        Ok(Kernel { raw })
    }
}

/// Bytes of groups, as the card reads them.
pub(super) fn bytes_of(groups: &[Group]) -> &[u8] {
    // SAFETY: plain numbers without gaps.
    unsafe { std::slice::from_raw_parts(groups.as_ptr().cast(), size_of_val(groups)) }
}
