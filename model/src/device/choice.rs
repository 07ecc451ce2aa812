//! Which devices compute, as `--device` says.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rayon::ThreadPool;

use super::{Cpu, Device};

/// The most cards of one node.
const MAX_CARDS: usize = 64;

/// Which devices hold and compute experts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// All cards, if this build can use them and there are any; else the processor.
    Auto,
    /// The processor.
    #[default]
    Cpu,
    /// These NVIDIA cards, by the driver's numbers; all of them if none is named.
    Cuda(Vec<u32>),
    /// The GPU of a machine by Apple.
    Metal,
}

/// A text that names no devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceChoiceError {
    /// The processor beside a card, or any beside `auto`.
    #[error("{0:?} stands alone: name auto, cpu, cuda, cuda:0, cuda:0,cuda:1, or metal")]
    NotAlone(String),
    /// A card twice.
    #[error("cuda:{0} is named twice")]
    Twice(u32),
    /// More cards than a node may have.
    #[error("at most {MAX_CARDS} cards may be named")]
    TooMany,
    /// Something else.
    #[error("{0:?} is no device: name auto, cpu, cuda, cuda:0, cuda:0,cuda:1, or metal")]
    Unknown(String),
}

impl FromStr for DeviceChoice {
    type Err = DeviceChoiceError;

    fn from_str(text: &str) -> Result<Self, DeviceChoiceError> {
        let named: Vec<&str> = text.split(',').map(str::trim).collect();
        let mut cards = Vec::new();
        for name in &named {
            let alone = match *name {
                "auto" => Self::Auto,
                "cpu" => Self::Cpu,
                "cuda" => Self::Cuda(Vec::new()),
                "metal" => Self::Metal,
                _ => {
                    let unknown = || DeviceChoiceError::Unknown((*name).to_owned());
                    let digits = name.strip_prefix("cuda:").ok_or_else(unknown)?;
                    let card = digits
                        .parse()
                        .ok()
                        .filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))
                        .ok_or_else(unknown)?;
                    if cards.contains(&card) {
                        return Err(DeviceChoiceError::Twice(card));
                    }
                    if cards.len() == MAX_CARDS {
                        return Err(DeviceChoiceError::TooMany);
                    }
                    cards.push(card);
                    continue;
                }
            };
            return if named.len() == 1 { Ok(alone) } else { Err(DeviceChoiceError::NotAlone((*name).to_owned())) };
        }
        Ok(Self::Cuda(cards))
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Metal => f.write_str("metal"),
            Self::Cuda(cards) if cards.is_empty() => f.write_str("cuda"),
            Self::Cuda(cards) => {
                let names: Vec<String> = cards.iter().map(|card| format!("cuda:{card}")).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

/// Why devices that were named cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This build has no backend for cards.
    #[error("this build computes on the processor only: build one with {HOW_TO_BUILD}")]
    NotBuilt,
    /// Metal is Apple's.
    #[error("metal is for GPUs of machines by Apple, and this program was not built for one")]
    NotApple,
    /// Metal shows no GPU.
    #[error("no GPU is here: Metal shows none")]
    NoGpu,
    /// The GPU is not one of those that the kernels are written for.
    #[error("metal cannot be used: {gpu} is no GPU of Apple's, or older than M1")]
    OldGpu {
        /// Its name.
        gpu: String,
    },
    /// The system is older than what the kernels' memory is managed with.
    #[error("metal cannot be used: macOS 15 or later is needed")]
    OldSystem,
    /// There is no driver.
    #[error("no NVIDIA driver is here: the system finds no libcuda.so.1, which comes with the driver")]
    NoDriver,
    /// The driver does not start.
    #[error("the NVIDIA driver does not work: {reason}")]
    Driver {
        /// What it says.
        reason: String,
    },
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver is too old: it knows CUDA up to {}, and 11.8 is needed (driver 520)", version(*.found))]
    OldDriver {
        /// A thousand times the major version and ten times the minor one.
        found: i32,
    },
    /// There is no such card.
    #[error("there is no cuda:{card}: the driver shows {cards} cards")]
    NoSuchCard {
        /// The number asked for.
        card: u32,
        /// How many there are.
        cards: usize,
    },
    /// A trunk is not divided among cards.
    #[error("a trunk lies on one card: name it, such as cuda:0")]
    SeveralCards,
    /// The card is older than the kernels.
    #[error("cuda:{card} is too old: compute capability {}.{}, and 6.0 is needed", .capability.0, .capability.1)]
    OldCard {
        /// Its number.
        card: u32,
        /// Major and minor.
        capability: (i32, i32),
    },
    /// The card does not start.
    #[error("{device} cannot be used: {reason}")]
    Card {
        /// As `--device` has it.
        device: String,
        /// What the driver says.
        reason: String,
    },
}

/// How to build with cards.
const HOW_TO_BUILD: &str = if cfg!(target_vendor = "apple") {
    "`cargo build --release --features metal`"
} else {
    "`cargo build --release --features cuda`, or an image with FEATURES=cuda (docker/README.md)"
};

/// CUDA's version as people write it.
pub(crate) fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// What the driver tells of a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardReport {
    /// As `--device` has it: `cuda:0`, `metal`.
    pub device: String,
    /// The maker's name for it.
    pub name: String,
    /// What no other card has.
    pub uuid: [u8; 16],
    /// Its generation in its maker's words: `compute capability 9.0`, `Apple family 7`.
    pub kind: String,
    /// Bytes free at present, and in all; or why that cannot be told.
    pub memory: Result<(u64, u64), String>,
    /// What is known of what drives it: `the driver knows CUDA 12.4`, `macOS 15.1`.
    pub driver: String,
}

/// All cards of this machine, in the order of their numbers.
///
/// # Errors
/// [`OpenError::NotBuilt`], or what keeps the driver from telling.
pub fn cards() -> Result<Vec<CardReport>, OpenError> {
    #[cfg(cards)]
    return crate::cards::cards();
    #[cfg(not(cards))]
    Err(OpenError::NotBuilt)
}

/// What tells the cards of this machine from each other, by their numbers. Takes no memory of them.
///
/// # Errors
/// As [`cards`].
pub fn card_uuids() -> Result<Vec<[u8; 16]>, OpenError> {
    #[cfg(cards)]
    return crate::cards::uuids();
    #[cfg(not(cards))]
    Err(OpenError::NotBuilt)
}

impl DeviceChoice {
    /// Opens the devices; `pool` computes where the processor is meant. There is at least one.
    ///
    /// # Errors
    /// Why a card that was named cannot be used. `auto` takes those that can be, or the processor, and says why if there is a driver.
    pub fn open(&self, pool: Arc<ThreadPool>) -> Result<Vec<Arc<dyn Device>>, OpenError> {
        match self {
            Self::Cpu => Ok(vec![Arc::new(Cpu::new(pool))]),
            Self::Cuda(_) | Self::Metal => {
                self.check_system()?;
                open_cards(self.card_numbers())
            }
            Self::Auto => {
                let mut devices = Vec::new();
                for (card, _) in (0..).zip(usable()) {
                    match open_cards(&[card]) {
                        Ok(opened) => devices.extend(opened),
                        Err(error) => tracing::warn!(%error, "a card is left out"),
                    }
                }
                if devices.is_empty() {
                    devices.push(Arc::new(Cpu::new(pool)));
                }
                Ok(devices)
            }
        }
    }

    /// The cards that are named, by their numbers; none where all are meant, or no cards.
    pub(super) fn card_numbers(&self) -> &[u32] {
        match self {
            Self::Auto | Self::Cpu => &[],
            Self::Cuda(cards) => cards,
            // One is all that such a machine has.
            Self::Metal => &[0],
        }
    }

    /// Whether a system such as this one can have what is named.
    pub(super) fn check_system(&self) -> Result<(), OpenError> {
        let is_apple = cfg!(target_vendor = "apple");
        match self {
            Self::Metal if !is_apple => Err(OpenError::NotApple),
            Self::Cuda(_) if is_apple => Err(OpenError::NoDriver),
            _ => Ok(()),
        }
    }
}

/// All cards; none where that cannot be told, which is said if there is a driver.
pub(super) fn usable() -> Vec<CardReport> {
    cards().unwrap_or_else(|error| {
        if !matches!(error, OpenError::NotBuilt | OpenError::NoDriver | OpenError::NoGpu) {
            tracing::warn!(%error, "computing on the processor");
        }
        Vec::new()
    })
}

#[cfg(cards)]
fn open_cards(cards: &[u32]) -> Result<Vec<Arc<dyn Device>>, OpenError> {
    let cards = crate::cards::open(cards)?;
    Ok(cards.into_iter().map(|card| Arc::new(card) as Arc<dyn Device>).collect())
}

#[cfg(not(cards))]
fn open_cards(_cards: &[u32]) -> Result<Vec<Arc<dyn Device>>, OpenError> {
    Err(OpenError::NotBuilt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_they_are_shown() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(vec![])),
            ("cuda:0", DeviceChoice::Cuda(vec![0])),
            ("cuda:3,cuda:1", DeviceChoice::Cuda(vec![3, 1])),
            ("metal", DeviceChoice::Metal),
        ] {
            assert_eq!(text.parse(), Ok(choice.clone()));
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda:1, cuda:2".parse(), Ok(DeviceChoice::Cuda(vec![1, 2])));
    }

    #[test]
    fn what_is_no_device_is_refused_with_the_names_of_those_that_are() {
        use DeviceChoiceError::{NotAlone, TooMany, Twice, Unknown};
        let refused = |text: &str| text.parse::<DeviceChoice>().unwrap_err();
        let numbers = ["cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:0,", "cuda:99999999999", "cuda:0;cuda:1"];
        for text in numbers.into_iter().chain(["", "gpu", "metal:0", "Metal"]) {
            assert!(matches!(refused(text), Unknown(_)), "{text:?}");
            assert!(refused(text).to_string().contains("cuda:0,cuda:1, or metal"));
        }
        assert_eq!(refused("metal,cpu"), NotAlone("metal".into()));
        assert_eq!(refused("cuda:0,metal"), NotAlone("metal".into()));
        assert_eq!(refused("cpu,cuda:0"), NotAlone("cpu".into()));
        assert_eq!(refused("cuda:0,auto"), NotAlone("auto".into()));
        assert_eq!(refused("cuda:1,cuda:0,cuda:1"), Twice(1));
        let many: Vec<String> = (0..=MAX_CARDS).map(|card| format!("cuda:{card}")).collect();
        assert_eq!(refused(&many.join(",")), TooMany);
    }

    #[test]
    #[cfg(not(target_vendor = "apple"))]
    fn metal_is_refused_where_there_cannot_be_any() {
        let pool = Arc::new(crate::compute_pool(1).unwrap());
        assert_eq!(DeviceChoice::Metal.open(pool).unwrap_err(), OpenError::NotApple);
        assert_eq!(DeviceChoice::Metal.open_for_trunk().unwrap_err(), OpenError::NotApple);
    }

    #[test]
    #[cfg(not(any(cards, target_vendor = "apple")))]
    fn a_build_without_cards_says_how_to_get_one_with_them() {
        let pool = Arc::new(crate::compute_pool(1).unwrap());
        let error = DeviceChoice::Cuda(vec![0]).open(pool.clone()).unwrap_err();
        assert!(error.to_string().contains("--features cuda"), "{error}");
        let opened = DeviceChoice::Auto.open(pool).unwrap();
        assert_eq!(opened.iter().map(|device| device.name()).collect::<Vec<_>>(), ["cpu"]);
    }
}
