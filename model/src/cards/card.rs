//! A card as a device: what it holds, and how a pass is computed on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{self, Context, Error, Gpu, Kernel, Memory, Mirror, Module, Stream, Upload, reason};
use super::dtype::Dtype;
use super::panels::{self, CHUNK, Layout};
use super::plan::{Group, PIECE_ROWS, Piece, Wanted, kernel_name, plan, room};
use crate::checkpoint::Swiglu;
use crate::device::{CardReport, CardUse, Device, DeviceError, HeldJob, OpenError, Weights, not_held};
use crate::expert::Expert;
use crate::spec::{Activation, MoeSpec};

/// Bytes that stay free on a card: for the screen, for other programs, and for what the driver itself takes.
const MARGIN_BYTES: u64 = 512 << 20;
/// Weights are handed over in pieces of so many bytes; while one is copied, the next is laid out.
pub(super) const UPLOAD_BYTES: usize = 4 << 20;
/// Rows begin at a multiple of this after the groups that go with them.
const ALIGNMENT: usize = 256;

/// What the driver tells of all cards.
pub(crate) fn cards() -> Result<Vec<CardReport>, OpenError> {
    driver::gpus()?.into_iter().map(|gpu| gpu.report().map_err(unusable(&gpu))).collect()
}

/// What tells cards from each other, by their numbers. Takes no memory of them.
pub(crate) fn uuids() -> Result<Vec<[u8; 16]>, OpenError> {
    driver::gpus()?.into_iter().map(|gpu| gpu.uuid().map_err(unusable(&gpu))).collect()
}

/// Opens cards by their numbers, or all of them.
pub(crate) fn open(wanted: &[u32]) -> Result<Vec<Card>, OpenError> {
    let gpus = driver::gpus()?;
    let none = |card| OpenError::NoSuchCard { card, cards: gpus.len() };
    if gpus.is_empty() {
        return Err(none(0));
    }
    if wanted.is_empty() {
        return gpus.iter().map(Card::open).collect();
    }
    let gpu = |&card: &u32| gpus.get(card as usize).ok_or_else(|| none(card));
    wanted.iter().map(|card| gpu(card).and_then(Card::open)).collect()
}

fn unusable(gpu: &Gpu) -> impl Fn(Error) -> OpenError {
    let device = gpu.name();
    move |error| OpenError::Card { device: device.clone(), reason: reason(error) }
}

/// A card in use.
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
    upload: Mutex<Upload>,
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
    input: Mirror,
    inner: Memory,
    output: Mirror,
}

impl Slot {
    fn new(context: &Arc<Context>, (x, inner, y): (usize, usize, usize)) -> Result<Self, Error> {
        let input = (PIECE_ROWS * size_of::<Group>()).next_multiple_of(ALIGNMENT) + 4 * x;
        Ok(Self {
            stream: Stream::new(context)?,
            input: Mirror::new(context, input)?,
            inner: Memory::new(context, 4 * inner)?,
            output: Mirror::new(context, 4 * y)?,
        })
    }

    /// Floats of input, of what lies between, and of output that there is room for.
    fn room(&self) -> (usize, usize, usize) {
        let input = self.input.on_card().bytes() - (PIECE_ROWS * size_of::<Group>()).next_multiple_of(ALIGNMENT);
        (input / 4, self.inner.bytes() / 4, self.output.on_card().bytes() / 4)
    }

    /// Copies a piece's rows over and has it computed and copied back; does not wait.
    ///
    /// # Safety
    /// The weights that the piece names live until the stream was waited for, and so does this.
    unsafe fn begin<R: Rows>(&mut self, kernels: &Kernels, piece: &Piece, rows: &R) -> Result<(), Error> {
        let groups = bytes_of(&piece.groups);
        let rows_at = groups.len().next_multiple_of(ALIGNMENT);
        self.input.bytes()[..groups.len()].copy_from_slice(groups);
        rows.fill(piece, &mut self.input.floats()[rows_at / 4..][..piece.x]);
        // SAFETY: there is room for the piece (`Card::compute` looks), the groups name places within it and weights that live, and
        // what is copied from and to is not touched before the stream was waited for.
        unsafe { self.stream.send(&mut self.input, rows_at + 4 * piece.x)? };
        let first = self.input.on_card();
        let (x, inner, y) = ((first, rows_at), (&self.inner, 0), (self.output.on_card(), 0));
        // Whether it is down, what it reads, what it writes.
        let both = [(false, x, inner), (true, inner, y)];
        let stages = if R::HALVES { &both[..] } else { &[(true, x, y)] };
        for &(is_down, input, output) in stages {
            for launch in &piece.launches {
                let class = launch.class;
                let (dtype, blocks) =
                    if is_down { (class.down, launch.down_blocks) } else { (class.up, launch.up_blocks) };
                let kernel = &kernels[&(class.many, dtype)];
                let groups = ((first, launch.groups.start * size_of::<Group>()), launch.groups.len());
                // SAFETY: as above.
                unsafe { self.stream.launch(kernel, (blocks, class.threads()), groups, (input, output), is_down)? };
            }
        }
        // SAFETY: as above.
        unsafe { self.stream.fetch(&mut self.output, 4 * piece.y) }
    }

    /// Waits for a piece and hands its rows out.
    fn end(&mut self, piece: &Piece, rows: &mut impl Rows) -> Result<(), Error> {
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
    fn open(gpu: &Gpu) -> Result<Self, OpenError> {
        let context = gpu.open()?;
        Self::start(gpu, context).map_err(unusable(gpu))
    }

    fn start(gpu: &Gpu, context: Arc<Context>) -> Result<Self, Error> {
        let uuid = gpu.uuid()?;
        let module = Module::new(&context)?;
        let mut kernels = BTreeMap::new();
        for (many, dtype) in [false, true].into_iter().flat_map(|many| Dtype::ALL.map(|dtype| (many, dtype))) {
            kernels.insert((many, dtype), module.kernel(&kernel_name(many, dtype))?);
        }
        let slot = || Slot::new(&context, (0, 0, 0));
        Ok(Self {
            name: gpu.name(),
            uuid,
            kernels,
            slots: Mutex::new([slot()?, slot()?]),
            upload: Mutex::new(Upload::new(&context, UPLOAD_BYTES)?),
            _module: module,
            context,
        })
    }

    pub(super) fn failed(&self, what: &'static str) -> impl Fn(Error) -> DeviceError + '_ {
        move |error| DeviceError::Failed { device: self.name.clone(), what, reason: reason(error) }
    }

    fn free(&self) -> Result<u64, DeviceError> {
        self.context.memory().map(|(free, _)| free).map_err(self.failed("asking for its free memory"))
    }

    /// Allocates where the margin stays free.
    fn allocate<T>(&self, bytes: u64, make: impl FnOnce() -> Result<T, Error>) -> Result<T, DeviceError> {
        let free_bytes = self.free()?;
        let no_room = || DeviceError::NoRoom { device: self.name.clone(), wanted_bytes: bytes, free_bytes };
        if free_bytes.saturating_sub(MARGIN_BYTES) < bytes {
            return Err(no_room());
        }
        let failed =
            |error| if driver::is_out_of_memory(&error) { no_room() } else { self.failed("allocating memory")(error) };
        make().map_err(failed)
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

    /// Takes in weights of `bytes` bytes, which `write` writes piece by piece.
    pub(super) fn take_in(
        &self,
        bytes: usize,
        pieces: &[panels::Piece],
        write: impl Fn(&panels::Piece, &mut [u8]),
    ) -> Result<Memory, DeviceError> {
        let mut memory = self.allocate(bytes as u64, || Memory::new(&self.context, bytes))?;
        lock(&self.upload).copy(pieces, write, &mut memory).map_err(self.failed("copying weights"))?;
        Ok(memory)
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
        self.take_in_swiglu(&expert.swiglu)
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
    pub(super) fn take_in_swiglu(&self, swiglu: &Swiglu) -> Result<Weights, DeviceError> {
        let layout = Layout::of(swiglu);
        self.make_room(room(layout.hidden_size, layout.inner_size))?;
        let write = |piece: &panels::Piece, to: &mut [u8]| layout.write(swiglu, piece, to);
        let memory = self.take_in(layout.bytes(), &layout.pieces(UPLOAD_BYTES), write)?;
        Ok(Box::new(OnCard { layout, activation: swiglu.activation, memory }))
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
            slots.iter_mut().for_each(|slot| _ = slot.stream.wait());
        }
        done.map_err(self.failed("computing"))
    }

    /// # Safety
    /// As [`Self::compute`]; after an error both streams have to be waited for.
    unsafe fn compute_in(&self, slots: &mut [Slot; 2], pieces: &[Piece], rows: &mut impl Rows) -> Result<(), Error> {
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

/// Bytes of groups, as the card reads them.
fn bytes_of(groups: &[Group]) -> &[u8] {
    // SAFETY: plain numbers without gaps.
    unsafe { std::slice::from_raw_parts(groups.as_ptr().cast(), size_of_val(groups)) }
}
