// Experts on a card, with the bits of the CPU's kernels (model/src/linear/kernel.rs): an output is sixteen lanes, each a chain of
// fused multiply-adds in ascending order, then one fixed tree of additions. Here a lane is a thread: sixteen threads compute eight
// outputs of each of a few rows, and no thread needs another one's before the tree. So a row's bits depend on nothing but the row
// and the weights: not on the number of rows, the other experts, the grid, or the card.
//
// Every operation is named with its rounding, so that no compiler joins two into one. tests/cuda/ptx.sh makes kernels.ptx of this.

// Values that the sixteen threads take at a time, one each.
#define CHUNK 16
// Chunks whose weights a thread reads at a time: sixteen bytes of each column in f16 and bf16.
#define OCTET 8
// Columns of a half of a warp.
#define COLUMNS 8
#define WHOLE_WARP 0xffffffffu

// The rows of one expert. `model/src/cuda/plan.rs` has the same.
struct Group {
    // Panels of sixteen columns as `model/src/cuda/panels.rs` lays them.
    const uint4 *gate_up;
    const uint4 *down;
    // Where its first row begins, in floats.
    unsigned long long x;
    unsigned long long inner;
    unsigned long long y;
    unsigned rows;
    unsigned hidden_size;
    // Outputs of gate_proj, padded to whole chunks.
    unsigned inner_size;
    // Blocks of the groups before it, in the launch for gate and up, and in the one for down.
    unsigned blocks_before_up;
    unsigned blocks_before_down;
    // Two to this power: the tiles of rows that a block computes side by side.
    unsigned side;
};

// The weights of an octet: of one column, and of this thread's lane.
struct F32 {
    enum { VECTORS = 2 };
    uint4 a, b;
    __device__ __forceinline__ void load(const uint4 *from) {
        a = __ldg(from);
        b = __ldg(from + 32);
    }
    __device__ __forceinline__ float value(int chunk) const {
        const unsigned bits[OCTET] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        return __uint_as_float(bits[chunk]);
    }
    static __device__ __forceinline__ float one(const uint4 *from, unsigned chunk) {
        return __ldg((const float *)(from + chunk / 4 * 32) + chunk % 4);
    }
};

struct Bf16 {
    enum { VECTORS = 1 };
    uint4 a;
    __device__ __forceinline__ void load(const uint4 *from) { a = __ldg(from); }
    __device__ __forceinline__ float value(int chunk) const {
        const unsigned pairs[OCTET / 2] = {a.x, a.y, a.z, a.w};
        return __uint_as_float(chunk % 2 ? pairs[chunk / 2] & 0xffff0000u : pairs[chunk / 2] << 16);
    }
    static __device__ __forceinline__ float one(const uint4 *from, unsigned chunk) {
        return __uint_as_float((unsigned)__ldg((const unsigned short *)from + chunk) << 16);
    }
};

#ifndef half_to_float
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

struct F16 {
    enum { VECTORS = 1 };
    uint4 a;
    __device__ __forceinline__ void load(const uint4 *from) { a = __ldg(from); }
    __device__ __forceinline__ float value(int chunk) const {
        const unsigned pairs[OCTET / 2] = {a.x, a.y, a.z, a.w};
        return half_to_float((unsigned short)(chunk % 2 ? pairs[chunk / 2] >> 16 : pairs[chunk / 2]));
    }
    static __device__ __forceinline__ float one(const uint4 *from, unsigned chunk) {
        return half_to_float(__ldg((const unsigned short *)from + chunk));
    }
};

// The chains of this thread's lane. `panel` is this thread's place in the panel, `x` are the lane's in the rows. The next weights
// are on their way while those before them are used.
template <class Weights, int ROWS>
__device__ __forceinline__ void add_products(const uint4 *panel, unsigned chunks, const float *(&x)[ROWS], float (&sums)[ROWS][COLUMNS]) {
    const unsigned step = COLUMNS * Weights::VECTORS * 32;
    Weights now[COLUMNS], next[COLUMNS];
    if (chunks >= OCTET) {
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) now[column].load(panel + column * Weights::VECTORS * 32);
    }
    for (; chunks >= OCTET; chunks -= OCTET) {
        panel += step;
        if (chunks >= 2 * OCTET) {
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) next[column].load(panel + column * Weights::VECTORS * 32);
        }
#pragma unroll
        for (int chunk = 0; chunk < OCTET; chunk++) {
            float values[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; row++) values[row] = __ldg(x[row] + chunk * CHUNK);
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                const float weight = now[column].value(chunk);
#pragma unroll
                for (int row = 0; row < ROWS; row++) sums[row][column] = __fmaf_rn(values[row], weight, sums[row][column]);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) x[row] += OCTET * CHUNK;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) now[column] = next[column];
    }
    // What is left of a width that is not a whole number of octets.
#pragma unroll 1
    for (unsigned chunk = 0; chunk < chunks; chunk++) {
        float values[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) values[row] = __ldg(x[row] + chunk * CHUNK);
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            const float weight = Weights::one(panel + column * Weights::VECTORS * 32, chunk);
#pragma unroll
            for (int row = 0; row < ROWS; row++) sums[row][column] = __fmaf_rn(values[row], weight, sums[row][column]);
        }
    }
}

// Lane i with i+8, the results i with i+4, then 2, then 1. Of eight columns each thread ends with one: number
// 4 * bit 3 + 2 * bit 2 + bit 1 of its lane.
__device__ __forceinline__ float tree(const float (&sums)[COLUMNS], unsigned lane) {
    float four[4], two[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float keep = lane & 8 ? sums[i + 4] : sums[i], give = lane & 8 ? sums[i] : sums[i + 4];
        four[i] = __fadd_rn(keep, __shfl_xor_sync(WHOLE_WARP, give, 8));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float keep = lane & 4 ? four[i + 2] : four[i], give = lane & 4 ? four[i] : four[i + 2];
        two[i] = __fadd_rn(keep, __shfl_xor_sync(WHOLE_WARP, give, 4));
    }
    const float keep = lane & 2 ? two[1] : two[0], give = lane & 2 ? two[0] : two[1];
    const float one = __fadd_rn(keep, __shfl_xor_sync(WHOLE_WARP, give, 2));
    return __fadd_rn(one, __shfl_xor_sync(WHOLE_WARP, one, 1));
}

// As `exp` in model/src/lanes.rs, operation by operation.
__device__ __forceinline__ float exponential(float x) {
    x = 88.0f < x ? 88.0f : x;
    x = -87.0f > x ? -87.0f : x;
    const float n = rintf(__fmul_rn(x, 1.44269504088896340736f));
    float r = __fmaf_rn(n, -0.693359375f, x);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __fmaf_rn(p, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, __fmul_rn(r, r), __fadd_rn(r, 1.0f));
    return __fmul_rn(p, __int_as_float((int)((unsigned)(__float2int_rn(n) + 127) << 23)));
}

__device__ __forceinline__ float silu_mul(float gate, float up) {
    const float denominator = __fadd_rn(1.0f, exponential(__fmul_rn(gate, -1.0f)));
    return __fmul_rn(__fdiv_rn(gate, denominator), up);
}

// What a warp computes: some rows of a group, and a panel.
struct Tile {
    const Group *group;
    unsigned row;
    unsigned panel;
    bool is_none;
};

template <int ROWS, bool DOWN>
__device__ __forceinline__ Tile find_tile(const Group *groups, unsigned count) {
    // The last group that begins at or before this block.
    unsigned low = 0, high = count;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if ((DOWN ? groups[middle].blocks_before_down : groups[middle].blocks_before_up) <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const Group *group = groups + low;
    const unsigned block = blockIdx.x - (DOWN ? group->blocks_before_down : group->blocks_before_up);
    const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const unsigned tiles = (group->rows + ROWS - 1) / ROWS;
    const unsigned row_blocks = (tiles + (1u << group->side) - 1) >> group->side;
    // Blocks that read the same weights follow each other.
    const unsigned tile = ((block % row_blocks) << group->side) + (warp & ((1u << group->side) - 1));
    const unsigned panel = block / row_blocks * (warps >> group->side) + (warp >> group->side);
    const unsigned panels = DOWN ? (group->hidden_size + 15) / 16 : group->inner_size / 8;
    Tile found = {group, tile * ROWS, panel, tile >= tiles || panel >= panels};
    return found;
}

// The rows of a tile times a panel. Rows that are not there are computed as the last one is, and not written.
template <class Weights, int ROWS>
__device__ __forceinline__ void multiply(const Tile &tile, const uint4 *panels, const float *x, unsigned width, float (&outputs)[ROWS]) {
    const unsigned thread = threadIdx.x % 32, lane = thread % CHUNK;
    const unsigned chunks = (width + CHUNK - 1) / CHUNK, octets = (chunks + OCTET - 1) / OCTET;
    const float *rows[ROWS];
    float sums[ROWS][COLUMNS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        const unsigned number = tile.row + row < tile.group->rows ? tile.row + row : tile.group->rows - 1;
        rows[row] = x + (unsigned long long)number * (chunks * CHUNK) + lane;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) sums[row][column] = 0.0f;
    }
    const uint4 *panel = panels + (unsigned long long)tile.panel * octets * (COLUMNS * Weights::VECTORS * 32) + thread;
    add_products<Weights, ROWS>(panel, chunks, rows, sums);
#pragma unroll
    for (int row = 0; row < ROWS; row++) outputs[row] = tree(sums[row], lane);
}

// inner = silu(gate_proj(x)) * up_proj(x). The first four columns of a half are gate's, the others up's.
template <class Weights, int ROWS>
__device__ __forceinline__ void gate_up(const Group *groups, unsigned count, const float *x, float *inner) {
    const Tile tile = find_tile<ROWS, false>(groups, count);
    if (tile.is_none) return;
    const Group *group = tile.group;
    float outputs[ROWS];
    multiply<Weights, ROWS>(tile, group->gate_up, x + group->x, group->hidden_size, outputs);
    const unsigned thread = threadIdx.x % 32;
    const unsigned column = tile.panel * 8 + thread / 16 * 4 + thread / 4 % 2 * 2 + thread / 2 % 2;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        const float up = __shfl_xor_sync(WHOLE_WARP, outputs[row], 8);
        if (thread % 2 == 0 && thread / 8 % 2 == 0 && tile.row + row < group->rows)
            inner[group->inner + (unsigned long long)(tile.row + row) * group->inner_size + column] = silu_mul(outputs[row], up);
    }
}

// y = down_proj(inner)
template <class Weights, int ROWS>
__device__ __forceinline__ void down(const Group *groups, unsigned count, const float *inner, float *y) {
    const Tile tile = find_tile<ROWS, true>(groups, count);
    if (tile.is_none) return;
    const Group *group = tile.group;
    float outputs[ROWS];
    multiply<Weights, ROWS>(tile, group->down, inner + group->inner, group->inner_size, outputs);
    const unsigned thread = threadIdx.x % 32;
    const unsigned column = tile.panel * 16 + thread / 16 * 8 + thread / 8 % 2 * 4 + thread / 4 % 2 * 2 + thread / 2 % 2;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        if (thread % 2 == 0 && column < group->hidden_size && tile.row + row < group->rows)
            y[group->y + (unsigned long long)(tile.row + row) * group->hidden_size + column] = outputs[row];
    }
}

// Few rows are limited by reading weights, which takes many small blocks; many by multiplying, which takes large tiles.
#define KERNELS(name, weights, rows, threads)                                                                                         \
    extern "C" __global__ void __launch_bounds__(threads)                                                                             \
        gate_up_##name##_##rows(const Group *groups, unsigned count, const float *x, float *inner) {                                  \
        gate_up<weights, rows>(groups, count, x, inner);                                                                              \
    }                                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(threads)                                                                             \
        down_##name##_##rows(const Group *groups, unsigned count, const float *inner, float *y) {                                     \
        down<weights, rows>(groups, count, inner, y);                                                                                 \
    }

KERNELS(f32, F32, 2, 64)
KERNELS(f32, F32, 8, 256)
KERNELS(f16, F16, 2, 64)
KERNELS(f16, F16, 8, 256)
KERNELS(bf16, Bf16, 2, 64)
KERNELS(bf16, Bf16, 8, 256)
