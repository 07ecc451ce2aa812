// Experts on a card, with the bits of the CPU's kernels (model/src/linear/kernel.rs): an output is sixteen lanes, each a chain of
// fused multiply-adds in ascending order, then one fixed tree of additions. Here a lane is a thread: sixteen threads compute eight
// outputs of each of a few rows, and no thread needs another one's before the tree. So a row's bits depend on nothing but the row
// and the weights: not on the number of rows, the other experts, the grid, or the card.
//
// Every operation is named with its rounding, so that no compiler joins two into one. Weights in few bits are widened in registers,
// each to the f32 that the CPU widens it to (model/src/linear/formats.rs). tests/cuda/ptx.sh makes kernels.ptx of this.

// Values that the sixteen threads take at a time, one each.
#define CHUNK 16
// Chunks whose weights a thread reads at a time: sixteen bytes of each column in f16 and bf16, eight in q8_0 and fp8, four in q4_k and
// mxfp4.
#define OCTET 8
// Columns of a half of a warp.
#define COLUMNS 8
#define WHOLE_WARP 0xffffffffu

// The rows of one expert. `model/src/cards/plan.rs` has the same.
struct Group {
    // Panels of sixteen columns as `model/src/cards/panels.rs` lays them.
    const uint4 *gate_up;
    const uint4 *down;
    // Of gate_proj, of up_proj, both padded as the outputs are, and of down_proj; null where there are none.
    const float *biases;
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
    // Of the activation: g * sigmoid(alpha * g) * (u + 1), both clamped; silu(g) * u where the limit is no number.
    float limit;
    float alpha;
};

// Each dtype says how a thread reads the weights of an octet, which are of its lane and of the eight columns of its half, from
// VECTORS vectors of its own, and from scales that its half shares. Scales of a panel lie behind its values, SCALE_BYTES for an octet.
// `load` begins to read, `open` is called before values are used, and `one` is a weight of a last octet that is not whole.
template <int COUNT>
struct Values {
    enum { VECTORS = COUNT };
    uint4 vectors[COUNT];
    __device__ __forceinline__ void load_values(const uint4 *values) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) vectors[i] = __ldg(values + i * 32);
    }
    __device__ __forceinline__ void open(unsigned) {}
};

// Floats, without scales.
template <int COUNT>
struct Floats : Values<COUNT> {
    enum { SCALE_BYTES = 0 };
    __device__ __forceinline__ void load(const uint4 *values, const uint4 *, unsigned, unsigned) { this->load_values(values); }
};

struct F32 : Floats<16> {
    __device__ __forceinline__ float value(int column, int chunk) const {
        const uint4 &four = vectors[2 * column + chunk / 4];
        const unsigned bits[4] = {four.x, four.y, four.z, four.w};
        return __uint_as_float(bits[chunk % 4]);
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *, unsigned, unsigned, int column, unsigned chunk) {
        return __ldg((const float *)(values + (2 * column + chunk / 4) * 32) + chunk % 4);
    }
};

struct Bf16 : Floats<8> {
    __device__ __forceinline__ float value(int column, int chunk) const {
        const unsigned pairs[OCTET / 2] = {vectors[column].x, vectors[column].y, vectors[column].z, vectors[column].w};
        return __uint_as_float(chunk % 2 ? pairs[chunk / 2] & 0xffff0000u : pairs[chunk / 2] << 16);
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *, unsigned, unsigned, int column, unsigned chunk) {
        return __uint_as_float((unsigned)__ldg((const unsigned short *)(values + column * 32) + chunk) << 16);
    }
};

#ifndef half_to_float
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

struct F16 : Floats<8> {
    __device__ __forceinline__ float value(int column, int chunk) const {
        const unsigned pairs[OCTET / 2] = {vectors[column].x, vectors[column].y, vectors[column].z, vectors[column].w};
        return half_to_float((unsigned short)(chunk % 2 ? pairs[chunk / 2] >> 16 : pairs[chunk / 2]));
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *, unsigned, unsigned, int column, unsigned chunk) {
        return half_to_float(__ldg((const unsigned short *)(values + column * 32) + chunk));
    }
};

// Eight bytes of each of eight columns, two columns to a vector.
struct EightBits : Values<4> {
    // The four bytes of which one is of this chunk.
    __device__ __forceinline__ unsigned word(int column, int chunk) const {
        const uint4 &two = vectors[column / 2];
        const unsigned words[4] = {two.x, two.y, two.z, two.w};
        return words[column % 2 * 2 + chunk / 4];
    }
    static __device__ __forceinline__ unsigned stored(const uint4 *values, int column, unsigned chunk) {
        return __ldg((const unsigned char *)(values + column / 2 * 32) + column % 2 * 8 + chunk);
    }
};

// Four bits, eight values in a word, of each of eight columns, four columns to a vector.
struct FourBits : Values<2> {
    __device__ __forceinline__ unsigned word(int column) const {
        const uint4 &four = vectors[column / 4];
        const unsigned words[4] = {four.x, four.y, four.z, four.w};
        return words[column % 4];
    }
    static __device__ __forceinline__ unsigned stored(const uint4 *values, int column) {
        return __ldg((const unsigned *)(values + column / 4 * 32) + column % 4);
    }
};

// A byte as a float: put into a float whose last bit counts one, from which the rest is taken away. Exact, and nothing is +0.
__device__ __forceinline__ float byte_to_float(unsigned word, unsigned byte, float rest) {
    return __fadd_rn(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | byte)), rest);
}

// A value is a byte less 128, times an f16 for each two chunks of a column.
struct Q8_0 : EightBits {
    enum { SCALE_BYTES = 128 };
    uint4 scales[4];
    __device__ __forceinline__ void load(const uint4 *values, const uint4 *from, unsigned octet, unsigned half) {
        load_values(values);
#pragma unroll
        for (int i = 0; i < 4; i++) scales[i] = __ldg(from + (octet * 2 + half) * 4 + i);
    }
    static __device__ __forceinline__ float widened(unsigned word, unsigned byte, unsigned scale) {
        return __fmul_rn(byte_to_float(word, byte, -8388736.0f), half_to_float((unsigned short)scale));
    }
    __device__ __forceinline__ float value(int column, int chunk) const {
        const uint4 &two = scales[column / 2];
        const unsigned words[4] = {two.x, two.y, two.z, two.w};
        const unsigned scale = words[column % 2 * 2 + chunk / 4];
        return widened(word(column, chunk), chunk % 4, chunk / 2 % 2 ? scale >> 16 : scale);
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *from, unsigned octet, unsigned half, int column, unsigned chunk) {
        const unsigned short *scales = (const unsigned short *)(from + (octet * 2 + half) * 4);
        return widened(stored(values, column, chunk), 0, __ldg(scales + column * 4 + chunk / 2));
    }
};

// A block of two octets of a column has the sixteen bytes that it has in GGML: two f16, scale and minimum, and a scale and a minimum of
// six bits for each two chunks. A value is scale * scale * bits - minimum * minimum. Widths are whole blocks.
struct Q4K : FourBits {
    enum { SCALE_BYTES = 128 };
    uint4 heads[COLUMNS];
    __device__ __forceinline__ void load(const uint4 *values, const uint4 *from, unsigned octet, unsigned half) {
        load_values(values);
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) heads[column] = __ldg(from + (octet / 2 * 2 + half) * COLUMNS + column);
    }
    // Makes two words of the twelve bytes: a byte for each two chunks of this octet, of scales and of minima.
    __device__ __forceinline__ void open(unsigned octet) {
        const unsigned lower = octet % 2 ? 0x0f0f0f0fu : 0, upper = octet % 2 ? 0x30303030u : 0x3f3f3f3fu, shift = octet % 2 * 2;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            uint4 &head = heads[column];
            head.y = (head.w & lower) | (head.y >> shift & upper);
            head.z = (head.w >> 4 & lower) | (head.z >> shift & upper);
        }
    }
    __device__ __forceinline__ float value(int column, int chunk) const {
        const uint4 &head = heads[column];
        const float scale = __fmul_rn(byte_to_float(head.y, chunk / 2, -8388608.0f), half_to_float((unsigned short)head.x));
        const float minimum = __fmul_rn(byte_to_float(head.z, chunk / 2, -8388608.0f), -half_to_float((unsigned short)(head.x >> 16)));
        const unsigned code = word(column) >> 4 * chunk & 15u;
        return __fmaf_rn(__fadd_rn(__uint_as_float(code | 0x4b000000u), -8388608.0f), scale, minimum);
    }
    // Never asked for.
    static __device__ __forceinline__ float one(const uint4 *, const uint4 *, unsigned, unsigned, int, unsigned) { return 0.0f; }
};

// Sign, four bits of exponent and three of mantissa (e4m3), times an f32 for an octet of four columns of either half.
struct Fp8 : EightBits {
    enum { SCALE_BYTES = 8 };
    float scales[2];
    __device__ __forceinline__ void load(const uint4 *values, const uint4 *from, unsigned octet, unsigned) {
        load_values(values);
        scales[0] = __ldg((const float *)from + 2 * octet);
        scales[1] = __ldg((const float *)from + 2 * octet + 1);
    }
    // The byte is the highest. Where the bits lie they count 2^-120 times as much, also those of subnormals, and no product but the last
    // is rounded.
    static __device__ __forceinline__ float widened(unsigned word, float scale) {
        const unsigned bits = (unsigned)((int)word >> 4) & 0x87f00000u;
        return __fmul_rn(__fmul_rn(__uint_as_float(bits), 1.329227995784916e36f), scale);
    }
    __device__ __forceinline__ float value(int column, int chunk) const {
        return widened(word(column, chunk) << (24 - chunk % 4 * 8), scales[column / 4]);
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *from, unsigned octet, unsigned, int column, unsigned chunk) {
        return widened(stored(values, column, chunk) << 24, __ldg((const float *)from + 2 * octet + column / 4));
    }
};

// Sign, two bits of exponent and one of mantissa (e2m1), times two to the power of a byte less 127 for each two chunks of a column.
struct Mxfp4 : FourBits {
    enum { SCALE_BYTES = 64 };
    uint4 scales[2];
    __device__ __forceinline__ void load(const uint4 *values, const uint4 *from, unsigned octet, unsigned half) {
        load_values(values);
#pragma unroll
        for (int i = 0; i < 2; i++) scales[i] = __ldg(from + (octet * 2 + half) * 2 + i);
    }
    // The bits are the highest four. Where they lie they count 2^-126 times as much, also those of subnormals, and no product is
    // rounded. The lowest scale is subnormal itself.
    static __device__ __forceinline__ float widened(unsigned word, unsigned exponent) {
        const unsigned bits = (unsigned)((int)word >> 6) & 0x81c00000u;
        const float scale = __uint_as_float(exponent ? exponent << 23 : 1u << 22);
        return __fmul_rn(__fmul_rn(__uint_as_float(bits), 8.507059173023462e37f), scale);
    }
    __device__ __forceinline__ float value(int column, int chunk) const {
        const uint4 &four = scales[column / 4];
        const unsigned words[4] = {four.x, four.y, four.z, four.w};
        return widened(word(column) << (28 - 4 * chunk), words[column % 4] >> chunk / 2 * 8 & 0xffu);
    }
    static __device__ __forceinline__ float one(const uint4 *values, const uint4 *from, unsigned octet, unsigned half, int column, unsigned chunk) {
        const unsigned char *scales = (const unsigned char *)(from + (octet * 2 + half) * 2);
        return widened(stored(values, column) << (28 - 4 * chunk), __ldg(scales + column * 4 + chunk / 2));
    }
};

// The chains of this thread's lane. `values` is this thread's place in the panel, `scales` are the panel's, `x` are the lane's in the
// rows. The next weights are on their way while those before them are used.
template <class Dtype, int ROWS>
__device__ __forceinline__ void add_products(
    const uint4 *values, const uint4 *scales, unsigned half, unsigned chunks, const float *(&x)[ROWS], float (&sums)[ROWS][COLUMNS]) {
    const unsigned octets = chunks / OCTET;
    Dtype now, next;
    if (octets > 0) now.load(values, scales, 0, half);
    for (unsigned octet = 0; octet < octets; octet++) {
        values += Dtype::VECTORS * 32;
        now.open(octet);
        if (octet + 1 < octets) next.load(values, scales, octet + 1, half);
#pragma unroll
        for (int chunk = 0; chunk < OCTET; chunk++) {
            float inputs[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; row++) inputs[row] = __ldg(x[row] + chunk * CHUNK);
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
                const float weight = now.value(column, chunk);
#pragma unroll
                for (int row = 0; row < ROWS; row++) sums[row][column] = __fmaf_rn(inputs[row], weight, sums[row][column]);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) x[row] += OCTET * CHUNK;
        now = next;
    }
    // What is left of a width that is not a whole number of octets.
#pragma unroll 1
    for (unsigned chunk = 0; chunk < chunks % OCTET; chunk++) {
        float inputs[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) inputs[row] = __ldg(x[row] + chunk * CHUNK);
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            const float weight = Dtype::one(values, scales, octets, half, column, chunk);
#pragma unroll
            for (int row = 0; row < ROWS; row++) sums[row][column] = __fmaf_rn(inputs[row], weight, sums[row][column]);
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

// g * sigmoid(alpha * g) * (u + 1), or silu(g) * u. A limit that is no number clamps nothing, and adding -0 changes nothing.
__device__ __forceinline__ float activation(float gate, float up, float limit, float alpha) {
    gate = limit < gate ? limit : gate;
    up = limit < up ? limit : up;
    up = -limit > up ? -limit : up;
    const float denominator = __fadd_rn(1.0f, exponential(__fmul_rn(gate, -alpha)));
    return __fmul_rn(__fdiv_rn(gate, denominator), __fadd_rn(up, limit == limit ? 1.0f : -0.0f));
}

// What a warp computes: some rows of a group, and a panel.
struct Tile {
    const Group *group;
    unsigned row;
    unsigned panel;
    bool is_none;
};

template <int ROWS>
__device__ __forceinline__ Tile find_tile(const Group *groups, unsigned count, bool is_down) {
    // The last group that begins at or before this block.
    unsigned low = 0, high = count;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if ((is_down ? groups[middle].blocks_before_down : groups[middle].blocks_before_up) <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const Group *group = groups + low;
    const unsigned block = blockIdx.x - (is_down ? group->blocks_before_down : group->blocks_before_up);
    const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const unsigned tiles = (group->rows + ROWS - 1) / ROWS;
    const unsigned row_blocks = (tiles + (1u << group->side) - 1) >> group->side;
    // Blocks that read the same weights follow each other.
    const unsigned tile = ((block % row_blocks) << group->side) + (warp & ((1u << group->side) - 1));
    const unsigned panel = block / row_blocks * (warps >> group->side) + (warp >> group->side);
    const unsigned panels = is_down ? (group->hidden_size + 15) / 16 : group->inner_size / 8;
    Tile found = {group, tile * ROWS, panel, tile >= tiles || panel >= panels};
    return found;
}

// The rows of a tile times a panel. Rows that are not there are computed as the last one is, and not written.
template <class Dtype, int ROWS>
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
    // Scales take whole lines of 128 bytes.
    const unsigned values = octets * (Dtype::VECTORS * 32), scales = (octets * Dtype::SCALE_BYTES + 127) / 128 * 8;
    const uint4 *panel = panels + (unsigned long long)tile.panel * (values + scales);
    add_products<Dtype, ROWS>(panel + thread, panel + values, thread / CHUNK, chunks, rows, sums);
#pragma unroll
    for (int row = 0; row < ROWS; row++) outputs[row] = tree(sums[row], lane);
}

// inner = activation(gate_proj(x), up_proj(x)), or y = down_proj(inner). Of a half the first four columns are gate's, the others up's.
template <class Dtype, int ROWS>
__device__ __forceinline__ void expert(const Group *groups, unsigned count, const float *input, float *output, bool is_down) {
    const Tile tile = find_tile<ROWS>(groups, count, is_down);
    if (tile.is_none) return;
    const Group *group = tile.group;
    float outputs[ROWS];
    multiply<Dtype, ROWS>(
        tile, is_down ? group->down : group->gate_up, input + (is_down ? group->inner : group->x),
        is_down ? group->inner_size : group->hidden_size, outputs);
    const unsigned thread = threadIdx.x % 32, half = thread / 16;
    const unsigned column = thread / 4 % 2 * 2 + thread / 2 % 2;
    const float *biases = group->biases;
    if (is_down) {
        const unsigned number = tile.panel * 16 + half * 8 + thread / 8 % 2 * 4 + column;
        if (thread % 2 || number >= group->hidden_size) return;
        const float bias = biases ? __ldg(biases + 2 * group->inner_size + number) : -0.0f;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (tile.row + row < group->rows)
                output[group->y + (unsigned long long)(tile.row + row) * group->hidden_size + number] = __fadd_rn(outputs[row], bias);
        }
    } else {
        const unsigned number = tile.panel * 8 + half * 4 + column;
        const float gate_bias = biases ? __ldg(biases + number) : -0.0f;
        const float up_bias = biases ? __ldg(biases + group->inner_size + number) : -0.0f;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            const float up = __shfl_xor_sync(WHOLE_WARP, outputs[row], 8);
            if (thread % 2 == 0 && thread / 8 % 2 == 0 && tile.row + row < group->rows)
                output[group->inner + (unsigned long long)(tile.row + row) * group->inner_size + number] =
                    activation(__fadd_rn(outputs[row], gate_bias), __fadd_rn(up, up_bias), group->limit, group->alpha);
        }
    }
}

// Few rows are limited by reading weights, which takes many small blocks; many by multiplying, which takes large tiles.
#define KERNEL(name, weights, rows, threads)                                                                                          \
    extern "C" __global__ void __launch_bounds__(threads)                                                                             \
        expert_##name##_##rows(const Group *groups, unsigned count, const float *input, float *output, unsigned is_down) {            \
        expert<weights, rows>(groups, count, input, output, is_down != 0);                                                            \
    }

// `Dtype` in model/src/cards/dtype.rs has the same.
#define KERNELS(rows, threads)                                                                                                        \
    KERNEL(f32, F32, rows, threads)                                                                                                   \
    KERNEL(f16, F16, rows, threads)                                                                                                   \
    KERNEL(bf16, Bf16, rows, threads)                                                                                                 \
    KERNEL(q8_0, Q8_0, rows, threads)                                                                                                 \
    KERNEL(q4_k, Q4K, rows, threads)                                                                                                  \
    KERNEL(fp8, Fp8, rows, threads)                                                                                                   \
    KERNEL(mxfp4, Mxfp4, rows, threads)

KERNELS(2, 64)
KERNELS(8, 256)
