//! What holds experts and computes them: the processor, or a card.
//!
//! Whatever computes an expert gives the same bits: every device adds up in the order of the CPU's kernels.

mod choice;
mod matrices;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

#[cfg(cards = "cuda")]
pub(crate) use choice::version;
pub use choice::{CardReport, DeviceChoice, DeviceChoiceError, OpenError, card_uuids, cards};
#[cfg(any(cards, test))]
pub(crate) use matrices::MatrixDevice;
pub use matrices::TrunkCard;
use rayon::ThreadPool;

use crate::expert::{Expert, ExpertJob, run_experts};
use crate::spec::MoeSpec;

/// Why a device did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// An expert does not fit. The device goes on with those that it has.
    #[error("{device} has no room for {wanted_bytes} bytes: {free_bytes} are free, of which some have to stay so")]
    NoRoom {
        /// The device's name.
        device: String,
        /// Bytes of the expert.
        wanted_bytes: u64,
        /// Bytes that the driver calls free.
        free_bytes: u64,
    },
    /// The device does not work any more: a card that was lost, a launch that failed. What it holds cannot be computed by it.
    #[error("{device} failed at {what}: {reason}")]
    Failed {
        /// The device's name.
        device: String,
        /// What was tried.
        what: &'static str,
        /// What the driver says.
        reason: String,
    },
}

/// What a device keeps of an expert that it holds. Only the device that made it can tell.
pub type Weights = Box<dyn Any + Send + Sync>;

/// Which card a device is, and what it has of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CardUse {
    /// What no other card has, as the driver gives it.
    pub uuid: [u8; 16],
    /// Bytes of the card's memory that experts and rows take at present, as the driver rounds them; not what it takes for itself.
    pub held_bytes: u64,
}

/// Something that holds experts and computes them. A row's bits are the same on all of them.
pub trait Device: fmt::Debug + Send + Sync {
    /// As `--device` has it: `cpu`, `cuda:0`, `metal`.
    fn name(&self) -> &str;

    /// Whether the threads of this process compute, so that it may be done in the caller's.
    fn is_host(&self) -> bool;

    /// Which card it is; `None` if it is none.
    fn card(&self) -> Option<CardUse> {
        None
    }

    /// Bytes of experts that it could take at present; `None` if it has no memory of its own.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]
    fn free_bytes(&self) -> Result<Option<u64>, DeviceError>;

    /// Takes the memory that computing experts of such a block needs besides their own.
    ///
    /// # Errors
    /// [`DeviceError::NoRoom`] or [`DeviceError::Failed`].
    fn prepare(&self, hidden_size: usize, moe: &MoeSpec) -> Result<(), DeviceError>;

    /// Takes an expert in: its weights are in the device's memory, in their stored dtype, for as long as the answer lives.
    ///
    /// # Errors
    /// [`DeviceError::NoRoom`] or [`DeviceError::Failed`].
    fn hold(&self, expert: Expert) -> Result<Weights, DeviceError>;

    /// Computes jobs as one piece of work. Jobs of experts that this device does not hold are an error.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: then no output may be used.
    fn run(&self, jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError>;
}

/// An expert in the memory of a device.
pub struct HeldExpert {
    device: Arc<dyn Device>,
    weights: Weights,
    bytes: u64,
    hidden_size: usize,
}

impl fmt::Debug for HeldExpert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldExpert")
            .field("device", &self.device.name())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl HeldExpert {
    /// Has a device take an expert in.
    ///
    /// # Errors
    /// Those of [`Device::hold`].
    pub fn new(device: &Arc<dyn Device>, expert: Expert) -> Result<Self, DeviceError> {
        let (bytes, hidden_size) = (expert.bytes(), expert.hidden_size());
        Ok(Self { weights: device.hold(expert)?, device: Arc::clone(device), bytes, hidden_size })
    }

    /// What holds it.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether it is this device that holds it, and not one that only has the same name.
    #[must_use]
    pub fn is_on(&self, device: &Arc<dyn Device>) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.device), Arc::as_ptr(device))
    }

    /// What the device keeps of it, if that is a `T`.
    #[must_use]
    pub fn weights<T: Any>(&self) -> Option<&T> {
        self.weights.downcast_ref()
    }

    /// Bytes of its weights as stored.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Values in a row of its input and output.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

/// One held expert applied to some rows.
#[derive(Debug)]
pub struct HeldJob<'a> {
    /// The expert.
    pub expert: &'a HeldExpert,
    /// `[rows, hidden_size]`
    pub hidden: &'a [f32],
    /// `[rows, hidden_size]`: overwritten with the result, not weighted.
    pub output: &'a mut [f32],
}

/// Computes all jobs, those of each device as one piece of work and the devices side by side; changes the order of the jobs.
/// Returns the devices that failed, whose jobs' outputs may not be used.
///
/// # Panics
/// If the input of a job is not a whole number of rows, or its output has another length.
pub fn run_held(jobs: &mut [HeldJob<'_>]) -> Vec<(Arc<dyn Device>, DeviceError)> {
    for HeldJob { expert, hidden, output } in &*jobs {
        assert_eq!(hidden.len() % expert.hidden_size, 0, "input in rows of {}", expert.hidden_size);
        assert_eq!(output.len(), hidden.len(), "output as long as the input");
    }
    jobs.sort_by_key(|job| Arc::as_ptr(job.expert.device()).cast::<()>());
    let mut groups: Vec<_> = jobs.chunk_by_mut(|a, b| a.expert.is_on(b.expert.device())).collect();
    let run = |jobs: &mut [HeldJob<'_>]| {
        let device = Arc::clone(jobs.first()?.expert.device());
        device.run(jobs).err().map(|error| (device, error))
    };
    let Some(last) = groups.pop() else { return Vec::new() };
    if groups.is_empty() {
        return run(last).into_iter().collect();
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = groups.into_iter().map(|jobs| scope.spawn(move || run(jobs))).collect();
        let failed = run(last);
        let others =
            others.into_iter().map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        others.chain([failed]).flatten().collect()
    })
}

/// The processor. Experts stay in the checkpoint's mapping.
#[derive(Debug)]
pub struct Cpu {
    pool: Arc<ThreadPool>,
}

impl Cpu {
    /// Computes over `pool`.
    #[must_use]
    pub fn new(pool: Arc<ThreadPool>) -> Self {
        Self { pool }
    }
}

/// An expert that another device holds, or one that is not what this one keeps.
pub(crate) fn not_held(device: &str) -> DeviceError {
    DeviceError::Failed {
        device: device.to_owned(),
        what: "finding an expert",
        reason: "another device holds it".into(),
    }
}

impl Device for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn is_host(&self) -> bool {
        true
    }

    fn free_bytes(&self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    fn prepare(&self, _hidden_size: usize, _moe: &MoeSpec) -> Result<(), DeviceError> {
        Ok(())
    }

    fn hold(&self, expert: Expert) -> Result<Weights, DeviceError> {
        Ok(Box::new(expert))
    }

    fn run(&self, jobs: &mut [HeldJob<'_>]) -> Result<(), DeviceError> {
        let jobs: Option<Vec<_>> = jobs
            .iter_mut()
            .map(|job| Some(ExpertJob { expert: job.expert.weights()?, hidden: job.hidden, output: job.output }))
            .collect();
        run_experts(&mut jobs.ok_or_else(|| not_held(self.name()))?, &self.pool);
        Ok(())
    }
}
