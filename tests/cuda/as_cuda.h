// What kernels.cu takes for CUDA when it is compiled for the processor (emulated.cpp).

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)

#define blockIdx (Index{here.block})
#define threadIdx (Index{here.thread})
#define blockDim (Index{here.threads})
struct Index {
    unsigned x;
};

#define __ldg checked_load
#define __uint_as_float float_of
static inline float __shfl_xor_sync(unsigned, float value, int mask) { return exchange(value, mask); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __int_as_float(int bits) { return float_of(static_cast<unsigned>(bits)); }
static inline int __float2int_rn(float value) { return std::isnan(value) ? 0 : static_cast<int>(std::nearbyint(value)); }
// Selectors without sign.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
static inline float emulated_half(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    const float size = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), static_cast<int>(exponent) - 25)
                                : std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -size : size;
}
#define half_to_float emulated_half
