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
    /// These cards, by the driver's numbers; all of them if none is named.
    Cuda(Vec<u32>),
}

/// A text that names no devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceChoiceError {
    /// Apple's cards.
    #[error("metal is not there yet: name auto, cpu, cuda, cuda:0, or cuda:0,cuda:1")]
    Metal,
    /// The processor beside a card, or any beside `auto`.
    #[error("{0:?} stands alone: name auto, cpu, cuda, cuda:0, or cuda:0,cuda:1")]
    NotAlone(String),
    /// A card twice.
    #[error("cuda:{0} is named twice")]
    Twice(u32),
    /// More cards than a node may have.
    #[error("at most {MAX_CARDS} cards may be named")]
    TooMany,
    /// Something else.
    #[error("{0:?} is no device: name auto, cpu, cuda, cuda:0, or cuda:0,cuda:1")]
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
                _ if name.split(':').next() == Some("metal") => return Err(DeviceChoiceError::Metal),
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
    #[error(
        "this build computes on the processor only: build one with `cargo build --release --features cuda`, or an image with FEATURES=cuda (docker/README.md)"
    )]
    NotBuilt,
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
    #[error("cuda:{card} cannot be used: {reason}")]
    Card {
        /// Its number.
        card: u32,
        /// What the driver says.
        reason: String,
    },
}

/// CUDA's version as people write it.
pub(crate) fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// What the driver tells of a card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardReport {
    /// The driver's number.
    pub card: u32,
    /// The maker's name for it.
    pub name: String,
    /// What no other card has.
    pub uuid: [u8; 16],
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes free at present, and in all; or why that cannot be told.
    pub memory: Result<(u64, u64), String>,
    /// The newest CUDA that the driver knows, such as `12.4`.
    pub driver: String,
}

/// All cards of this machine.
///
/// # Errors
/// [`OpenError::NotBuilt`], or what keeps the driver from telling.
pub fn cards() -> Result<Vec<CardReport>, OpenError> {
    #[cfg(feature = "cuda")]
    return crate::cuda::cards();
    #[cfg(not(feature = "cuda"))]
    Err(OpenError::NotBuilt)
}

/// What tells the cards of this machine from each other, by their numbers. Takes no memory of them.
///
/// # Errors
/// As [`cards`].
pub fn card_uuids() -> Result<Vec<[u8; 16]>, OpenError> {
    #[cfg(feature = "cuda")]
    return crate::cuda::uuids();
    #[cfg(not(feature = "cuda"))]
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
            Self::Cuda(cards) => open_cards(cards),
            Self::Auto => {
                let mut devices = Vec::new();
                for CardReport { card, .. } in usable() {
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
}

/// All cards; none where that cannot be told, which is said if there is a driver.
pub(super) fn usable() -> Vec<CardReport> {
    cards().unwrap_or_else(|error| {
        if !matches!(error, OpenError::NotBuilt | OpenError::NoDriver) {
            tracing::warn!(%error, "computing on the processor");
        }
        Vec::new()
    })
}

#[cfg(feature = "cuda")]
fn open_cards(cards: &[u32]) -> Result<Vec<Arc<dyn Device>>, OpenError> {
    let cards = crate::cuda::open(cards)?;
    Ok(cards.into_iter().map(|card| Arc::new(card) as Arc<dyn Device>).collect())
}

#[cfg(not(feature = "cuda"))]
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
        ] {
            assert_eq!(text.parse(), Ok(choice.clone()));
            assert_eq!(choice.to_string(), text);
        }
        assert_eq!("cuda:1, cuda:2".parse(), Ok(DeviceChoice::Cuda(vec![1, 2])));
    }

    #[test]
    fn what_is_no_device_is_refused_with_the_names_of_those_that_are() {
        use DeviceChoiceError::{Metal, NotAlone, TooMany, Twice, Unknown};
        let refused = |text: &str| text.parse::<DeviceChoice>().unwrap_err();
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:0,", "cuda:99999999999", "cuda:0;cuda:1"]
        {
            assert!(matches!(refused(text), Unknown(_)), "{text:?}");
            assert!(refused(text).to_string().contains("cuda:0,cuda:1"));
        }
        assert_eq!((refused("metal"), refused("metal:0")), (Metal, Metal));
        assert_eq!(refused("cpu,cuda:0"), NotAlone("cpu".into()));
        assert_eq!(refused("cuda:0,auto"), NotAlone("auto".into()));
        assert_eq!(refused("cuda:1,cuda:0,cuda:1"), Twice(1));
        let many: Vec<String> = (0..=MAX_CARDS).map(|card| format!("cuda:{card}")).collect();
        assert_eq!(refused(&many.join(",")), TooMany);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_cards_says_how_to_get_one_with_them() {
        let pool = Arc::new(crate::compute_pool(1).unwrap());
        let error = DeviceChoice::Cuda(vec![0]).open(pool.clone()).unwrap_err();
        assert!(error.to_string().contains("--features cuda"), "{error}");
        let opened = DeviceChoice::Auto.open(pool).unwrap();
        assert_eq!(opened.iter().map(|device| device.name()).collect::<Vec<_>>(), ["cpu"]);
    }
}
