//! A card as a device: what it holds, and how a pass is computed on it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::DriverError;

use super::driver::{self, Context, Kernel, Memory, Module, Pinned, Stream, reason};
use super::dtype::Dtype;
use super::panels::{self, CHUNK, Layout};
use super::plan::{Group, PIECE_ROWS, Piece, Wanted, kernel_name, plan, room};
use crate::checkpoint::Swiglu;
use crate::device::{CardReport, CardUse, Device, DeviceError, HeldJob, OpenError, Weights, not_held, version};
use crate::expert::Expert;
use crate::spec::{Activation, MoeSpec};

/// Bytes that stay free on a card: for the screen, for other programs, and for what the driver itself takes.
const MARGIN_BYTES: u64 = 512 << 20;
/// Weights are handed over in pieces of so many bytes; while one is copied, the next is laid out.
pub(super) const UPLOAD_BYTES: usize = 4 << 20;
/// The oldest cards that the kernels are compiled for.
const OLDEST_CAPABILITY: (i32, i32) = (6, 0);
/// Rows begin at a multiple of this after the groups that go with them.
const ALIGNMENT: usize = 256;

/// What the driver tells of all cards.
pub(crate) fn cards() -> Result<Vec<CardReport>, OpenError> {
    let (newest, count) = driver::start()?;
    (0..count as u32)
        .map(|card| {
            let failed = |error| OpenError::Card { card, reason: reason(error) };
            let (device, name, capability) = driver::look(card).map_err(failed)?;
            let uuid = driver::uuid(device).map_err(failed)?;
            let memory = Context::new(device).and_then(|context| context.memory()).map_err(reason);
            Ok(CardReport { card, name, uuid, capability, memory, driver: version(newest) })
        })
        .collect()
}

/// What tells cards from each other, by their numbers. Takes no memory of them.
pub(crate) fn uuids() -> Result<Vec<[u8; 16]>, OpenError> {
    let (_, count) = driver::start()?;
    (0..count as u32)
        .map(|card| {
            let uuid = driver::look(card).and_then(|(device, ..)| driver::uuid(device));
            uuid.map_err(|error| OpenError::Card { card, reason: reason(error) })
        })
        .collect()
}

/// Opens cards by their numbers, or all of them.
pub(crate) fn open(wanted: &[u32]) -> Result<Vec<Card>, OpenError> {
    let (_, cards) = driver::start()?;
    let all: Vec<u32> = (0..cards as u32).collect();
    let wanted = if wanted.is_empty() { &all } else { wanted };
    if wanted.is_empty() {
        return Err(OpenError::NoSuchCard { card: 0, cards });
    }
    wanted
        .iter()
        .map(|&card| if all.contains(&card) { Card::open(card) } else { Err(OpenError::NoSuchCard { card, cards }) })
        .collect()
}

/// An NVIDIA card.
#[derive(Debug)]
pub(crate) struct Card {
    name: String,
    uuid: [u8; 16],
    context: Arc<Context>,
    kernels: Kernels,
    /// What kernels are part of.
    _module: Module,
    /// Two, so that one is filled while the other is computed.
    slots: Mutex<[Slot; 2]>,
    upload: Mutex<[(Pinned, Stream); 2]>,
}

/// Kernels for few rows and for many, of each dtype.
type Kernels = BTreeMap<(bool, Dtype), Kernel>;

/// An expert in a card's memory.
struct OnCard {
    layout: Layout,
    activation: Activation,
    memory: Memory,
}

/// Room for one piece.
#[derive(Debug)]
struct Slot {
    stream: Stream,
    /// Groups, and then rows.
    input: Pinned,
    output: Pinned,
    input_on_card: Memory,
    inner_on_card: Memory,
    output_on_card: Memory,
}

impl Slot {
    fn new(context: &Arc<Context>, (x, inner, y): (usize, usize, usize)) -> Result<Self, DriverError> {
        let input = (PIECE_ROWS * size_of::<Group>()).next_multiple_of(ALIGNMENT) + 4 * x;
        Ok(Self {
            stream: Stream::new(context)?,
            input: Pinned::new(context, input)?,
            output: Pinned::new(context, 4 * y)?,
            input_on_card: Memory::new(context, input)?,
            inner_on_card: Memory::new(context, 4 * inner)?,
            output_on_card: Memory::new(context, 4 * y)?,
        })
    }

    /// Floats of input, of what lies between, and of output that there is room for.
    fn room(&self) -> (usize, usize, usize) {
        let input = self.input_on_card.bytes() - (PIECE_ROWS * size_of::<Group>()).next_multiple_of(ALIGNMENT);
        (input / 4, self.inner_on_card.bytes() / 4, self.output_on_card.bytes() / 4)
    }

    /// Copies a piece's rows over and has it computed and copied back; does not wait.
    ///
    /// # Safety
    /// The weights that the piece names live until the stream was waited for, and so does this.
    unsafe fn begin<R: Rows>(&mut self, kernels: &Kernels, piece: &Piece, rows: &R) -> Result<(), DriverError> {
        let groups = driver::bytes_of(&piece.groups);
        let rows_at = groups.len().next_multiple_of(ALIGNMENT);
        self.input.bytes()[..groups.len()].copy_from_slice(groups);
        rows.fill(piece, &mut self.input.floats()[rows_at / 4..][..piece.x]);
        let (first, x) = (self.input_on_card.address(), self.input_on_card.address() + rows_at as u64);
        let (inner, y) = (self.inner_on_card.address(), self.output_on_card.address());
        // Whether it is down, what it reads, what it writes.
        let both = [(false, x, inner), (true, inner, y)];
        let stages = if R::HALVES { &both[..] } else { &[(true, x, y)] };
        // SAFETY: there is room for the piece (`Card::compute` looks), the groups name places within it and weights that live, and
        // what is copied from and to is not touched before the stream was waited for.
        unsafe {
            self.stream.copy_to(&mut self.input, rows_at + 4 * piece.x, &self.input_on_card, 0)?;
            for &(is_down, input, output) in stages {
                for launch in &piece.launches {
                    let class = launch.class;
                    let (dtype, blocks) =
                        if is_down { (class.down, launch.down_blocks) } else { (class.up, launch.up_blocks) };
                    let kernel = &kernels[&(class.many, dtype)];
                    let groups = (first + (launch.groups.start * size_of::<Group>()) as u64, launch.groups.len());
                    self.stream.launch(kernel, (blocks, class.threads()), groups, (input, output), is_down)?;
                }
            }
            self.stream.copy_from(&self.output_on_card, 4 * piece.y, &mut self.output)
        }
    }

    /// Waits for a piece and hands its rows out.
    fn end(&mut self, piece: &Piece, rows: &mut impl Rows) -> Result<(), DriverError> {
        self.stream.wait()?;
        rows.take(piece, self.output.floats());
        Ok(())
    }
}

/// What the pieces of some work are filled with, and where their results go.
pub(super) trait Rows {
    /// Whether there are two launches, gate and up and then down, or only one like down.
    const HALVES: bool;
    /// Writes a piece's input, each row padded to whole chunks.
    fn fill(&self, piece: &Piece, x: &mut [f32]);
    /// Reads its output.
    fn take(&mut self, piece: &Piece, y: &[f32]);
}

/// Rows for experts.
struct ExpertRows<'a, 'b>(&'a mut [HeldJob<'b>]);

impl Rows for ExpertRows<'_, '_> {
    const HALVES: bool = true;

    fn fill(&self, piece: &Piece, x: &mut [f32]) {
        for part in &piece.parts {
            let job = &self.0[part.job];
            let width = job.expert.hidden_size();
            copy_padded(&job.hidden[part.rows.start * width..part.rows.end * width], width, &mut x[part.x..]);
        }
    }

    fn take(&mut self, piece: &Piece, y: &[f32]) {
        for part in &piece.parts {
            let job = &mut self.0[part.job];
            let width = job.expert.hidden_size();
            let values = part.rows.len() * width;
            job.output[part.rows.start * width..][..values].copy_from_slice(&y[part.y..part.y + values]);
        }
    }
}

/// Copies rows of `width` values to the beginning of `to`, each padded to whole chunks.
pub(super) fn copy_padded(rows: &[f32], width: usize, to: &mut [f32]) {
    let padded = width.next_multiple_of(CHUNK);
    if padded == width {
        to[..rows.len()].copy_from_slice(rows);
        return;
    }
    for (to, row) in to.chunks_exact_mut(padded).zip(rows.chunks_exact(width)) {
        to[..width].copy_from_slice(row);
        to[width..].fill(0.0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    fn open(card: u32) -> Result<Self, OpenError> {
        let failed = |error| OpenError::Card { card, reason: reason(error) };
        let (device, _, capability) = driver::look(card).map_err(failed)?;
        if capability < OLDEST_CAPABILITY {
            return Err(OpenError::OldCard { card, capability });
        }
        Self::start(format!("cuda:{card}"), device).map_err(failed)
    }

    fn start(name: String, device: cudarc::driver::sys::CUdevice) -> Result<Self, DriverError> {
        let uuid = driver::uuid(device)?;
        let context = Context::new(device)?;
        let text = CString::new(super::PTX).unwrap_or_default();
        let module = Module::new(&context, &text)?;
        let mut kernels = BTreeMap::new();
        for (many, dtype) in [false, true].into_iter().flat_map(|many| Dtype::ALL.map(|dtype| (many, dtype))) {
            let name = CString::new(kernel_name(many, dtype)).unwrap_or_default();
            kernels.insert((many, dtype), module.kernel(name)?);
        }
        let slot = || Slot::new(&context, (0, 0, 0));
        let upload = || Ok((Pinned::new(&context, UPLOAD_BYTES)?, Stream::new(&context)?));
        Ok(Self {
            name,
            uuid,
            kernels,
            slots: Mutex::new([slot()?, slot()?]),
            upload: Mutex::new([upload()?, upload()?]),
            _module: module,
            context,
        })
    }

    pub(super) fn failed(&self, what: &'static str) -> impl Fn(DriverError) -> DeviceError + '_ {
        move |error| DeviceError::Failed { device: self.name.clone(), what, reason: reason(error) }
    }

    fn free(&self) -> Result<u64, DeviceError> {
        self.context.memory().map(|(free, _)| free).map_err(self.failed("asking for its free memory"))
    }

    /// Allocates where the margin stays free.
    fn allocate<T>(&self, bytes: u64, make: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DeviceError> {
        let free_bytes = self.free()?;
        let no_room = || DeviceError::NoRoom { device: self.name.clone(), wanted_bytes: bytes, free_bytes };
        if free_bytes.saturating_sub(MARGIN_BYTES) < bytes {
            return Err(no_room());
        }
        make().map_err(|error| match error.0 {
            cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => no_room(),
            _ => self.failed("allocating memory")(error),
        })
    }

    /// Makes room for pieces, if there is not enough.
    pub(super) fn make_room(&self, wanted: (usize, usize, usize)) -> Result<(), DeviceError> {
        let mut slots = lock(&self.slots);
        let has = slots[0].room();
        if wanted.0 <= has.0 && wanted.1 <= has.1 && wanted.2 <= has.2 {
            return Ok(());
        }
        let wanted = (wanted.0.max(has.0), wanted.1.max(has.1), wanted.2.max(has.2));
        let bytes = 2 * 4 * (wanted.0 + wanted.1 + wanted.2) as u64;
        let new = || Ok([Slot::new(&self.context, wanted)?, Slot::new(&self.context, wanted)?]);
        *slots = self.allocate(bytes, new)?;
        Ok(())
    }

    /// Copies weights over, which `write` writes piece by piece.
    pub(super) fn upload(
        &self,
        pieces: &[panels::Piece],
        write: impl Fn(&panels::Piece, &mut [u8]),
        memory: &Memory,
    ) -> Result<(), DriverError> {
        let mut buffers = lock(&self.upload);
        for (number, piece) in pieces.iter().enumerate() {
            let (pinned, stream) = &mut buffers[number % 2];
            // The copy before the last, from the same buffer.
            stream.wait()?;
            if pinned.bytes().len() < piece.bytes {
                *pinned = Pinned::new(&self.context, piece.bytes)?;
            }
            write(piece, &mut pinned.bytes()[..piece.bytes]);
            // SAFETY: the buffer is waited for before it is used or dropped, here and below, and the memory outlives this call.
            unsafe { stream.copy_to(pinned, piece.bytes, memory, piece.at)? };
        }
        buffers.iter().try_for_each(|(_, stream)| stream.wait())
    }
}

impl Device for Card {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_host(&self) -> bool {
        false
    }

    fn card(&self) -> Option<CardUse> {
        Some(CardUse { uuid: self.uuid, held_bytes: self.context.held_bytes() })
    }

    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        self.free().map(|free| Some(free.saturating_sub(MARGIN_BYTES)))
    }

    fn prepare(&self, hidden_size: usize, moe: &MoeSpec) -> Result<(), DeviceError> {
        self.make_room(room(hidden_size, moe.intermediate_size))
    }

    fn hold(&self, expert: Expert) -> Result<Weights, DeviceError> {
        self.take_in(&expert.swiglu)
    }

    fn run(&self, jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        let wanted: Option<Vec<Wanted>> = jobs
            .iter()
            .map(|job| {
                let OnCard { layout, activation, memory } =
                    job.expert.weights().filter(|held: &&OnCard| held.memory.is_of(&self.context))?;
                let rows = job.hidden.len() / layout.hidden_size;
                assert_eq!(job.hidden.len(), rows * layout.hidden_size, "input in whole rows");
                assert_eq!(job.output.len(), job.hidden.len(), "output as long as the input");
                Some(Wanted { layout: *layout, activation: *activation, weights: memory.address(), rows })
            })
            .collect();
        let pieces = plan(&wanted.ok_or_else(|| not_held(&self.name))?);
        // Each expert made room for pieces of its shape when it was taken in, and room never shrinks.
        // SAFETY: the pieces are of what the jobs borrow.
        unsafe { self.compute(|_| pieces, &mut ExpertRows(jobs)) }
    }
}

impl Card {
    /// Takes a SwiGLU's weights in.
    pub(super) fn take_in(&self, swiglu: &Swiglu) -> Result<Weights, DeviceError> {
        let layout = Layout::of(swiglu);
        self.make_room(room(layout.hidden_size, layout.inner_size))?;
        let memory = self.memory(layout.bytes())?;
        let write = |piece: &panels::Piece, to: &mut [u8]| layout.write(swiglu, piece, to);
        self.upload(&layout.pieces(UPLOAD_BYTES), write, &memory).map_err(self.failed("copying weights"))?;
        Ok(Box::new(OnCard { layout, activation: swiglu.activation, memory }))
    }

    /// Memory where the margin stays free.
    pub(super) fn memory(&self, bytes: usize) -> Result<Memory, DeviceError> {
        self.allocate(bytes as u64, || Memory::new(&self.context, bytes))
    }

    /// Whether the memory is this card's.
    pub(super) fn has(&self, memory: &Memory) -> bool {
        memory.is_of(&self.context)
    }

    /// Computes pieces, which are made for the room that there is, the next copied while one is computed.
    ///
    /// # Safety
    /// The pieces name weights of this card that live until this returns.
    pub(super) unsafe fn compute(
        &self,
        pieces: impl FnOnce((usize, usize, usize)) -> Vec<Piece>,
        rows: &mut impl Rows,
    ) -> Result<(), DeviceError> {
        let mut slots = lock(&self.slots);
        let room = slots[0].room();
        let pieces = pieces(room);
        let fits = |piece: &Piece| piece.x <= room.0 && piece.inner <= room.1 && piece.y <= room.2;
        assert!(pieces.iter().all(fits), "room for pieces");
        // SAFETY: as the caller promises; after an error all is waited for below.
        let done = unsafe { self.compute_in(&mut slots, &pieces, rows) };
        if done.is_err() {
            // Nothing of what was asked for may still use memory that its owners let go of.
            slots.iter().for_each(|slot| _ = slot.stream.wait());
        }
        done.map_err(self.failed("computing"))
    }

    /// # Safety
    /// As [`Self::compute`]; after an error both streams have to be waited for.
    unsafe fn compute_in(
        &self,
        slots: &mut [Slot; 2],
        pieces: &[Piece],
        rows: &mut impl Rows,
    ) -> Result<(), DriverError> {
        for (number, piece) in pieces.iter().enumerate() {
            if let Some(last) = number.checked_sub(2) {
                slots[number % 2].end(&pieces[last], rows)?;
            }
            // SAFETY: the weights live, and all pieces are waited for, here and below, or by the caller after an error.
            unsafe { slots[number % 2].begin(&self.kernels, piece, rows)? };
        }
        for number in pieces.len().saturating_sub(2)..pieces.len() {
            slots[number % 2].end(&pieces[number], rows)?;
        }
        Ok(())
    }
}
