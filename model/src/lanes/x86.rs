//! Lanes in one AVX-512 register, or in two AVX registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Lanes;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Eight lanes to one: i with i+4, then i+2, then i+1.
#[inline(always)]
unsafe fn sum8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let one = _mm_add_ss(two, _mm_shuffle_ps::<1>(two, two));
        _mm_cvtss_f32(one)
    }
}

/// Sixteen floats of eight bits (e4m3) as f16, which has one more bit of exponent and another bias: divided by 256.
#[inline(always)]
unsafe fn halves_of_e4m3(bytes: __m128i) -> __m256i {
    unsafe {
        // The sign is now there twice; the lower one gives way.
        let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
        _mm256_and_si256(shifted, _mm256_set1_epi16(0xbfff_u16 as i16))
    }
}

pub(crate) struct Avx512;

impl Lanes for Avx512 {
    type V = __m512;
    type Half = __m256;
    type Bytes = __m128i;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(v: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn halves(v: __m512) -> [__m256; 2] {
        unsafe { [_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))] }
    }
    #[inline(always)]
    unsafe fn join([lower, upper]: [__m256; 2]) -> __m512 {
        unsafe {
            let lower = _mm512_castps_pd(_mm512_castps256_ps512(lower));
            _mm512_castpd_ps(_mm512_insertf64x4::<1>(lower, _mm256_castps_pd(upper)))
        }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_half_f16(from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_half_bf16(from: *const bf16) -> __m256 {
        unsafe { Avx2::load_half_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store_half(v: __m256, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add_half(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    unsafe fn exp2_whole(a: __m512) -> __m512 {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m128i {
        unsafe { _mm_loadu_si128(from.cast()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: __m128i) -> __m128i {
        unsafe { _mm_and_si128(bytes, _mm_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: __m128i) -> __m128i {
        unsafe { _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn in_turns(a: __m128i, b: __m128i) -> [__m128i; 2] {
        unsafe { [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)] }
    }
    #[inline(always)]
    unsafe fn from_i8(bytes: __m128i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)) }
    }
    #[inline(always)]
    unsafe fn look_up(table: __m512, codes: __m128i) -> __m512 {
        unsafe { _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table) }
    }
    #[inline(always)]
    unsafe fn from_e4m3(bytes: __m128i) -> __m512 {
        unsafe { _mm512_cvtph_ps(halves_of_e4m3(bytes)) }
    }
    #[inline(always)]
    unsafe fn half_to_f32(bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into()))) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let [low, high] = Self::halves(a);
            sum8(_mm256_add_ps(low, high))
        }
    }
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            // The same additions as in `sum`, of four vectors side by side. First i with i+8:
            let halves = |a, b| {
                _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
            };
            let (ab, cd) = (halves(a, b), halves(c, d));
            // i with i+4; then a quarter is one of the four.
            let abcd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
            );
            let two = _mm512_add_ps(abcd, _mm512_permute_ps::<0b01_00_11_10>(abcd));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
            let first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(_mm512_permutexvar_ps(first, one)));
            sums
        }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

pub(crate) struct Avx2;

impl Lanes for Avx2 {
    type V = (__m256, __m256);
    type Half = __m256;
    type Bytes = __m128i;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        unsafe { (_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        unsafe { (Self::load_half_f16(from), Self::load_half_f16(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        unsafe { (Self::load_half_bf16(from), Self::load_half_bf16(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, v.0);
            _mm256_storeu_ps(to.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn halves(v: Self::V) -> [__m256; 2] {
        [v.0, v.1]
    }
    #[inline(always)]
    unsafe fn join([lower, upper]: [__m256; 2]) -> Self::V {
        (lower, upper)
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_half_f16(from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_half_bf16(from: *const bf16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store_half(v: __m256, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add_half(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        unsafe { (_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) }
    }
    #[inline(always)]
    unsafe fn exp2_whole(a: Self::V) -> Self::V {
        unsafe {
            let power = |a| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            (power(a.0), power(a.1))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m128i {
        unsafe { _mm_loadu_si128(from.cast()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: __m128i) -> __m128i {
        unsafe { _mm_and_si128(bytes, _mm_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: __m128i) -> __m128i {
        unsafe { _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn in_turns(a: __m128i, b: __m128i) -> [__m128i; 2] {
        unsafe { [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)] }
    }
    #[inline(always)]
    unsafe fn from_i8(bytes: __m128i) -> Self::V {
        unsafe {
            let (low, high) = (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn look_up(table: Self::V, codes: __m128i) -> Self::V {
        unsafe {
            // By the lower three bits in either half of the table; the fourth, as a sign, says in which.
            let eight = |codes| {
                let codes = _mm256_cvtepu8_epi32(codes);
                let (low, high) = (_mm256_permutevar8x32_ps(table.0, codes), _mm256_permutevar8x32_ps(table.1, codes));
                _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
            };
            (eight(codes), eight(_mm_unpackhi_epi64(codes, codes)))
        }
    }
    #[inline(always)]
    unsafe fn from_e4m3(bytes: __m128i) -> Self::V {
        unsafe {
            let halves = halves_of_e4m3(bytes);
            (_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)))
        }
    }
    #[inline(always)]
    unsafe fn half_to_f32(bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into()))) }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        unsafe { sum8(_mm256_add_ps(a.0, a.1)) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
        unsafe {
            // The same additions as in `sum`, of four vectors side by side. First i with i+8:
            let [a, b, c, d] = v.map(|v| _mm256_add_ps(v.0, v.1));
            // i with i+4; then a half is one of two.
            let quarters =
                |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let (ab, cd) = (quarters(a, b), quarters(c, d));
            // i with i+2; then a quarter is one of the four: a, c, b, d.
            let two =
                _mm256_add_ps(_mm256_shuffle_ps::<0b01_00_01_00>(ab, cd), _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd));
            let one = _mm256_add_ps(two, _mm256_permute_ps::<0b10_11_00_01>(two));
            let (ac, bd) = (_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_movelh_ps(_mm_unpacklo_ps(ac, bd), _mm_unpackhi_ps(ac, bd)));
            sums
        }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_near<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
