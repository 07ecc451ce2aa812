//! Sixteen f32 lanes, in the same arithmetic on every machine.
//!
//! Every kernel is written once over [`Lanes`] and instantiated for AVX-512, AVX2 with FMA, and portable code (which on
//! aarch64 is NEON, as its fused multiply-add is part of the base). Each operation rounds once, as IEEE 754 says, and
//! sums go through one fixed tree, so that all instantiations give the same bits.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use std::sync::OnceLock;

use half::{bf16, f16};

/// Lanes in a vector.
pub(crate) const LANES: usize = 16;

/// Operations on sixteen f32 lanes.
///
/// # Safety
/// Every function may only be called on a machine that has the instructions of the implementation, and pointers must
/// be valid for [`LANES`] values.
pub(crate) trait Lanes {
    type V: Copy;
    /// The first or the last eight lanes.
    type Half: Copy;
    /// Sixteen bytes.
    type Bytes: Copy;
    /// There are registers for tiles of sixteen outputs; otherwise for six.
    const WIDE: bool;

    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn store(v: Self::V, to: *mut f32);
    /// `a * b + c`, rounded once.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The first eight lanes and the last.
    unsafe fn halves(v: Self::V) -> [Self::Half; 2];
    /// The other way round.
    unsafe fn join(halves: [Self::Half; 2]) -> Self::V;
    unsafe fn load_half(from: *const f32) -> Self::Half;
    unsafe fn load_half_f16(from: *const f16) -> Self::Half;
    unsafe fn load_half_bf16(from: *const bf16) -> Self::Half;
    unsafe fn store_half(v: Self::Half, to: *mut f32);
    /// [`Lanes::mul_add`] of eight lanes.
    unsafe fn mul_add_half(a: Self::Half, b: Self::Half, c: Self::Half) -> Self::Half;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// Two to the power of whole numbers from -126 to 127.
    unsafe fn exp2_whole(a: Self::V) -> Self::V;
    /// Lane i with i+8, the results i with i+4, then 2, then 1.
    unsafe fn sum(a: Self::V) -> f32;
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    /// The lower four bits of each byte.
    unsafe fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// The upper four bits of each byte.
    unsafe fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// In turns one of `a` and one of `b`: those of the first eight of each, then the others.
    unsafe fn in_turns(a: Self::Bytes, b: Self::Bytes) -> [Self::Bytes; 2];
    /// Signed bytes as floats.
    unsafe fn from_i8(bytes: Self::Bytes) -> Self::V;
    /// Bytes below sixteen by what `table` has for them.
    unsafe fn look_up(table: Self::V, codes: Self::Bytes) -> Self::V;
    /// Floats of eight bits (e4m3, without infinities), divided by 256. Bytes that are no numbers give some number.
    unsafe fn from_e4m3(bytes: Self::Bytes) -> Self::V;
    /// An f16.
    unsafe fn half_to_f32(bits: u16) -> f32;
    /// [`Lanes::sum`] of each.
    #[inline(always)]
    unsafe fn sum4(a: [Self::V; 4]) -> [f32; 4] {
        a.map(|a| unsafe { Self::sum(a) })
    }
    /// Has the cache line of `at` brought to the second cache. Any address will do: nothing is read.
    #[inline(always)]
    unsafe fn prefetch<T>(_at: *const T) {}
    /// [`Lanes::prefetch`], to the first cache.
    #[inline(always)]
    unsafe fn prefetch_near<T>(_at: *const T) {}
}

/// A dtype in which weights are stored.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    const ZERO: Self;
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V;
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load_half<L: Lanes>(from: *const Self) -> L::Half;
}

impl Stored for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn load_half<L: Lanes>(from: *const Self) -> L::Half {
        unsafe { L::load_half(from) }
    }
}

impl Stored for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        unsafe { L::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn load_half<L: Lanes>(from: *const Self) -> L::Half {
        unsafe { L::load_half_f16(from) }
    }
}

impl Stored for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        unsafe { L::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn load_half<L: Lanes>(from: *const Self) -> L::Half {
        unsafe { L::load_half_bf16(from) }
    }
}

/// Copies up to sixteen values into a buffer padded with zeros: how every kernel treats the end of a row.
///
/// # Safety
/// `from` must be valid for `len` values, and `len` at most [`LANES`].
#[inline(always)]
pub(crate) unsafe fn padded<W: Stored>(from: *const W, len: usize) -> [W; LANES] {
    let mut buffer = [W::ZERO; LANES];
    unsafe { std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), len) };
    buffer
}

/// e to the power of each lane, within 2 units in the last place. Below -87 it stays at e^-87, above 88 at e^88.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L::V) -> L::V {
    unsafe {
        let x = L::max(L::splat(-87.0), L::min(L::splat(88.0), x));
        let n = L::round(L::mul(x, L::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first exact when multiplied by n.
        let r = L::mul_add(n, L::splat(-0.693_359_4), x);
        let r = L::mul_add(n, L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = L::mul_add(p, r, L::splat(c));
        }
        let p = L::mul_add(p, L::mul(r, r), L::add(r, L::splat(1.0)));
        L::mul(p, L::exp2_whole(n))
    }
}

/// The instructions that a kernel may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// The variable that names instructions.
const VARIABLE: &str = "HANSE_ISA";

/// The variable `HANSE_ISA` names instructions that this machine has not, or that nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE} is {named:?}, and here it can be {}", available.join(" or "))]
pub struct IsaError {
    /// What it names.
    pub named: String,
    /// What it can name on this machine, best first.
    pub available: Vec<String>,
}

/// Checks the variable `HANSE_ISA`, which names the instructions that kernels are run with (`avx512`, `avx2`, `portable`), for measurements.
/// It is read once in a process; empty is as unset.
///
/// # Errors
/// If it names none of those that this machine has. What is computed nevertheless, is computed with the best.
pub fn check_isa() -> Result<(), IsaError> {
    Isa::chosen().as_ref().map(|_| ()).map_err(Clone::clone)
}

impl Isa {
    /// The one that the variable names, or else the best that this machine has.
    pub(crate) fn detect() -> Self {
        Self::chosen().as_ref().map_or_else(|_| Self::available()[0], |isa| *isa)
    }

    fn chosen() -> &'static Result<Self, IsaError> {
        static CHOSEN: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CHOSEN.get_or_init(|| Self::named(&std::env::var_os(VARIABLE).unwrap_or_default().to_string_lossy()))
    }

    /// By its name in any case; the best if that is empty.
    fn named(name: &str) -> Result<Self, IsaError> {
        let available = Self::available();
        if name.is_empty() {
            return Ok(available[0]);
        }
        let names = || available.iter().map(|isa| format!("{isa:?}").to_lowercase());
        let found = names().zip(&available).find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, isa)| *isa).ok_or_else(|| IsaError { named: name.to_owned(), available: names().collect() })
    }

    /// See [`Lanes::WIDE`].
    pub(crate) fn is_wide(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::WIDE,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::WIDE,
            Self::Portable => Portable::WIDE,
        }
    }

    /// All that this machine has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            // Without VL, vectors of eight could not be in the upper sixteen registers, and tiles not stay in registers.
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                found.push(Self::Avx512);
            }
            if avx2 {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }
}

/// Defines a function that runs a body, generic over [`Lanes`], with the instructions that an [`Isa`] allows.
macro_rules! instantiate {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        $vis unsafe fn $name $(<$generic: $bound>)? (isa: $crate::lanes::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512 $(<$generic: $bound>)? ($($arg: $type),*) {
                unsafe { $body::<$crate::lanes::Avx512 $(, $generic)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$generic: $bound>)? ($($arg: $type),*) {
                unsafe { $body::<$crate::lanes::Avx2 $(, $generic)?>($($arg),*) }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::lanes::Isa::Avx512 => unsafe { avx512 $(::<$generic>)? ($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::lanes::Isa::Avx2 => unsafe { avx2 $(::<$generic>)? ($($arg),*) },
                $crate::lanes::Isa::Portable => unsafe { $body::<$crate::lanes::Portable $(, $generic)?>($($arg),*) },
            }
        }
    };
}
pub(crate) use instantiate;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_that_are_not_there_are_refused_with_those_that_are() {
        let best = Isa::available()[0];
        assert_eq!(Isa::named(""), Ok(best));
        assert_eq!(Isa::named(&format!("{best:?}").to_uppercase()), Ok(best));
        assert_eq!(Isa::named("portable"), Ok(Isa::Portable));
        for name in ["avx-512", "portable ", "neon", "avx1024"] {
            let error = Isa::named(name).unwrap_err();
            assert_eq!((error.named.as_str(), error.available.len()), (name, Isa::available().len()));
            assert!(error.to_string().ends_with("portable"), "{error}");
        }
    }
}
