// Experts on an Apple GPU, with the bits of the CPU's kernels (model/src/linear/kernel.rs): what cards/cuda/kernels.cu says, in Metal's
// language. A lane is a thread, eight outputs of each of a few rows are computed by sixteen threads, and no thread needs another one's
// before the tree of additions.
//
// Metal promises the rounding of single operations, and nothing for subnormal floats, which Apple's GPUs take for zero. So weights are
// widened by way of normal floats and integers only, to the bits that the CPU widens them to. The driver compiles this text when it
// starts; it is C++ without what Metal leaves out, such as inheritance. tests/cuda/emulated.sh runs it without a GPU.
#include <metal_stdlib>
using namespace metal;

#pragma METAL fp math_mode(safe)
// Nobody may join a product and a sum that are apart here.
#pragma METAL fp contract(off)

// Values that the sixteen threads take at a time, one each.
#define CHUNK 16
// Chunks whose weights a thread reads at a time.
#define OCTET 8
// Columns of a half of a simdgroup.
#define COLUMNS 8
#define UNROLL _Pragma("clang loop unroll(full)")

// The rows of one expert. `model/src/cards/plan.rs` has the same, and kernels.cu says what it is.
struct Group {
    device const uint4 *gate_up;
    device const uint4 *down;
    device const float *biases;
    ulong x;
    ulong inner;
    ulong y;
    uint rows;
    uint hidden_size;
    uint inner_size;
    uint blocks_before_up;
    uint blocks_before_down;
    uint side;
    float limit;
    float alpha;
};

#ifndef fetch
template <class T>
inline T fetch(device const T *from) {
    return *from;
}
#endif

// A number that is known when this is compiled, of a vector.
inline uint word_of(uint4 vector, int number) {
    return number == 0 ? vector.x : number == 1 ? vector.y : number == 2 ? vector.z : vector.w;
}

// Two bytes as a float. Those below the normal ones of their format are made by taking away what was added in front of them.
inline float f16_to_float(uint bits) {
    const uint size = (bits & 0x7fffu) << 13, exponent = bits & 0x7c00u, sign = (bits & 0x8000u) << 16;
    const uint wide = size + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
    const float low = as_type<float>(size + 0x38800000u) - 6.103515625e-05f;
    return as_type<float>((exponent == 0 ? as_type<uint>(low) : wide) | sign);
}

// A byte as a float, less `rest`: put into a float whose last bit counts one, from which that and the rest are taken away.
inline float byte_to_float(uint word, uint byte, float rest) {
    return as_type<float>(0x4b000000u | (word >> 8 * byte & 0xffu)) - (8388608.0f + rest);
}

// Each dtype says how a thread reads the weights of an octet, which are of its lane and of the eight columns of its half, from
// VECTORS vectors of its own, and from scales that its half shares. Scales of a panel lie behind its values, SCALE_BYTES for an octet.
// `open` is called before values are used, and `one` is a weight of a last octet that is not whole.
struct F32 {
    enum { VECTORS = 16, SCALE_BYTES = 0 };
    uint4 vectors[16];
    void load(device const uint4 *values, device const uint4 *, uint, uint) {
        UNROLL for (int i = 0; i < 16; i++) vectors[i] = fetch(values + i * 32);
    }
    void open(uint) {}
    float value(int column, int chunk) const { return as_type<float>(word_of(vectors[2 * column + chunk / 4], chunk % 4)); }
    static float one(device const uint4 *values, device const uint4 *, uint, uint, int column, uint chunk) {
        return fetch((device const float *)(values + (2 * column + chunk / 4) * 32) + chunk % 4);
    }
};

struct F16Bits {
    static float widened(uint bits) { return f16_to_float(bits); }
};
struct Bf16Bits {
    static float widened(uint bits) { return as_type<float>(bits << 16); }
};

template <class Bits>
struct SixteenBits {
    enum { VECTORS = 8, SCALE_BYTES = 0 };
    uint4 vectors[8];
    void load(device const uint4 *values, device const uint4 *, uint, uint) {
        UNROLL for (int i = 0; i < 8; i++) vectors[i] = fetch(values + i * 32);
    }
    void open(uint) {}
    float value(int column, int chunk) const {
        const uint pair = word_of(vectors[column], chunk / 2);
        return Bits::widened(chunk % 2 ? pair >> 16 : pair & 0xffffu);
    }
    static float one(device const uint4 *values, device const uint4 *, uint, uint, int column, uint chunk) {
        return Bits::widened(fetch((device const ushort *)(values + column * 32) + chunk));
    }
};

// Eight bytes of each of eight columns, two columns to a vector.
struct EightBits {
    uint4 vectors[4];
    void load(device const uint4 *values) {
        UNROLL for (int i = 0; i < 4; i++) vectors[i] = fetch(values + i * 32);
    }
    // The four bytes of which one is of this chunk.
    uint word(int column, int chunk) const { return word_of(vectors[column / 2], column % 2 * 2 + chunk / 4); }
    static uint stored(device const uint4 *values, int column, uint chunk) {
        return fetch((device const uchar *)(values + column / 2 * 32) + column % 2 * 8 + chunk);
    }
};

// Four bits, eight values in a word, of each of eight columns, four columns to a vector.
struct FourBits {
    uint4 vectors[2];
    void load(device const uint4 *values) {
        UNROLL for (int i = 0; i < 2; i++) vectors[i] = fetch(values + i * 32);
    }
    uint code(int column, int chunk) const { return word_of(vectors[column / 4], column % 4) >> 4 * chunk & 15u; }
    static uint stored(device const uint4 *values, int column, uint chunk) {
        return fetch((device const uint *)(values + column / 4 * 32) + column % 4) >> 4 * chunk & 15u;
    }
};

// A value is a byte less 128, times an f16 for each two chunks of a column.
struct Q8_0 {
    enum { VECTORS = 4, SCALE_BYTES = 128 };
    EightBits bytes;
    uint4 scales[4];
    void load(device const uint4 *values, device const uint4 *from, uint octet, uint which) {
        bytes.load(values);
        UNROLL for (int i = 0; i < 4; i++) scales[i] = fetch(from + (octet * 2 + which) * 4 + i);
    }
    void open(uint) {}
    static float widened(uint word, uint byte, uint scale) { return byte_to_float(word, byte, 128.0f) * f16_to_float(scale & 0xffffu); }
    float value(int column, int chunk) const {
        const uint scale = word_of(scales[column / 2], column % 2 * 2 + chunk / 4);
        return widened(bytes.word(column, chunk), chunk % 4, chunk / 2 % 2 ? scale >> 16 : scale);
    }
    static float one(device const uint4 *values, device const uint4 *from, uint octet, uint which, int column, uint chunk) {
        device const ushort *scales = (device const ushort *)(from + (octet * 2 + which) * 4);
        return widened(EightBits::stored(values, column, chunk), 0, fetch(scales + column * 4 + chunk / 2));
    }
};

// A block of two octets of a column has the sixteen bytes that it has in GGML: two f16, scale and minimum, and a scale and a minimum of
// six bits for each two chunks. A value is scale * scale * bits - minimum * minimum. Widths are whole blocks.
struct Q4K {
    enum { VECTORS = 2, SCALE_BYTES = 128 };
    FourBits bits;
    uint4 heads[COLUMNS];
    void load(device const uint4 *values, device const uint4 *from, uint octet, uint which) {
        bits.load(values);
        UNROLL for (int column = 0; column < COLUMNS; column++) heads[column] = fetch(from + (octet / 2 * 2 + which) * COLUMNS + column);
    }
    // Makes two words of the twelve bytes: a byte for each two chunks of this octet, of scales and of minima.
    void open(uint octet) {
        const uint lower = octet % 2 ? 0x0f0f0f0fu : 0, upper = octet % 2 ? 0x30303030u : 0x3f3f3f3fu, shift = octet % 2 * 2;
        UNROLL for (int column = 0; column < COLUMNS; column++) {
            const uint4 head = heads[column];
            heads[column].y = (head.w & lower) | (head.y >> shift & upper);
            heads[column].z = (head.w >> 4 & lower) | (head.z >> shift & upper);
        }
    }
    float value(int column, int chunk) const {
        const uint4 head = heads[column];
        const float scale = byte_to_float(head.y, chunk / 2, 0.0f) * f16_to_float(head.x & 0xffffu);
        const float minimum = byte_to_float(head.z, chunk / 2, 0.0f) * -f16_to_float(head.x >> 16);
        return fma(byte_to_float(bits.code(column, chunk), 0, 0.0f), scale, minimum);
    }
    // Never asked for.
    static float one(device const uint4 *, device const uint4 *, uint, uint, int, uint) { return 0.0f; }
};

// Sign, four bits of exponent and three of mantissa (e4m3), times an f32 for an octet of four columns of either half.
struct Fp8 {
    enum { VECTORS = 4, SCALE_BYTES = 8 };
    EightBits bytes;
    float scales[2];
    void load(device const uint4 *values, device const uint4 *from, uint octet, uint) {
        bytes.load(values);
        UNROLL for (int i = 0; i < 2; i++) scales[i] = fetch((device const float *)from + 2 * octet + i);
    }
    void open(uint) {}
    // Without exponent a mantissa counts 2^-9.
    static float widened(uint byte, float scale) {
        const uint size = (byte & 0x7fu) << 20, sign = (byte & 0x80u) << 24;
        const float low = as_type<float>(size + 0x3c800000u) - 0.015625f;
        return as_type<float>((byte & 0x78u ? size + 0x3c000000u : as_type<uint>(low)) | sign) * scale;
    }
    float value(int column, int chunk) const { return widened(bytes.word(column, chunk) >> chunk % 4 * 8 & 0xffu, scales[column / 4]); }
    static float one(device const uint4 *values, device const uint4 *from, uint octet, uint, int column, uint chunk) {
        return widened(EightBits::stored(values, column, chunk), fetch((device const float *)from + 2 * octet + column / 4));
    }
};

// Sign, two bits of exponent and one of mantissa (e2m1), times two to the power of a byte less 127 for each two chunks of a column.
struct Mxfp4 {
    enum { VECTORS = 2, SCALE_BYTES = 64 };
    FourBits bits;
    uint4 scales[2];
    void load(device const uint4 *values, device const uint4 *from, uint octet, uint which) {
        bits.load(values);
        UNROLL for (int i = 0; i < 2; i++) scales[i] = fetch(from + (octet * 2 + which) * 2 + i);
    }
    void open(uint) {}
    // Without exponent the mantissa counts a half. The lowest scale is subnormal, and so are the products that it has.
    static float widened(uint code, uint exponent) {
        const uint size = code & 6u ? ((code & 7u) << 22) + 0x3f000000u : (code & 1u) * 0x3f000000u;
        const float scale = as_type<float>(exponent ? exponent << 23 : 1u << 22);
        return as_type<float>(size | (code & 8u) << 28) * scale;
    }
    float value(int column, int chunk) const {
        return widened(bits.code(column, chunk), word_of(scales[column / 4], column % 4) >> chunk / 2 * 8 & 0xffu);
    }
    static float one(device const uint4 *values, device const uint4 *from, uint octet, uint which, int column, uint chunk) {
        device const uchar *scales = (device const uchar *)(from + (octet * 2 + which) * 2);
        return widened(FourBits::stored(values, column, chunk), fetch(scales + column * 4 + chunk / 2));
    }
};

// Where a thread is: which of the grid's blocks, and which simdgroup of how many in it.
struct Position {
    uint block;
    uint warp;
    uint warps;
    // Of the simdgroup.
    uint number;
};

template <int ROWS>
struct Rows {
    device const float *at[ROWS];
};
template <int ROWS>
struct Sums {
    float of[ROWS][COLUMNS];
};

// Adds the products of a chunk of the lane's rows and weights, which `WEIGHT` gives by column.
#define ADD_CHUNK(WEIGHT)                                                                                                             \
    {                                                                                                                                 \
        float inputs[ROWS];                                                                                                           \
        UNROLL for (int row = 0; row < ROWS; row++) inputs[row] = fetch(x.at[row] + chunk * CHUNK);                                   \
        UNROLL for (int column = 0; column < COLUMNS; column++) {                                                                     \
            const float weight = WEIGHT;                                                                                              \
            UNROLL for (int row = 0; row < ROWS; row++) sums.of[row][column] = fma(inputs[row], weight, sums.of[row][column]);        \
        }                                                                                                                             \
    }

// The chains of this thread's lane. `values` is this thread's place in the panel, `scales` are the panel's, `x` are the lane's in the
// rows.
template <class Dtype, int ROWS>
inline void add_products(
    device const uint4 *values, device const uint4 *scales, uint which, uint chunks, thread Rows<ROWS> &x, thread Sums<ROWS> &sums) {
    const uint octets = chunks / OCTET;
    for (uint octet = 0; octet < octets; octet++) {
        Dtype now;
        now.load(values, scales, octet, which);
        now.open(octet);
        values += Dtype::VECTORS * 32;
        UNROLL for (int chunk = 0; chunk < OCTET; chunk++) ADD_CHUNK(now.value(column, chunk))
        UNROLL for (int row = 0; row < ROWS; row++) x.at[row] += OCTET * CHUNK;
    }
    // What is left of a width that is not a whole number of octets.
    for (uint chunk = 0; chunk < chunks % OCTET; chunk++) ADD_CHUNK(Dtype::one(values, scales, octets, which, column, chunk))
}

// Lane i with i+8, the results i with i+4, then 2, then 1. Of eight columns each thread ends with one: number
// 4 * bit 3 + 2 * bit 2 + bit 1 of its lane.
inline float tree(thread const float *sums, uint lane) {
    float four[4], two[2];
    UNROLL for (int i = 0; i < 4; i++) {
        const float keep = lane & 8 ? sums[i + 4] : sums[i], give = lane & 8 ? sums[i] : sums[i + 4];
        four[i] = keep + simd_shuffle_xor(give, ushort(8));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const float keep = lane & 4 ? four[i + 2] : four[i], give = lane & 4 ? four[i] : four[i + 2];
        two[i] = keep + simd_shuffle_xor(give, ushort(4));
    }
    const float keep = lane & 2 ? two[1] : two[0], give = lane & 2 ? two[0] : two[1];
    const float one = keep + simd_shuffle_xor(give, ushort(2));
    return one + simd_shuffle_xor(one, ushort(1));
}

// As `exp` in model/src/lanes.rs, operation by operation. Nothing in it is subnormal.
inline float exponential(float x) {
    x = 88.0f < x ? 88.0f : x;
    x = -87.0f > x ? -87.0f : x;
    const float n = rint(x * 1.44269504088896340736f);
    float r = fma(n, -0.693359375f, x);
    r = fma(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fma(p, r, 1.3981999507e-3f);
    p = fma(p, r, 8.3334519073e-3f);
    p = fma(p, r, 4.1665795894e-2f);
    p = fma(p, r, 1.6666665459e-1f);
    p = fma(p, r, 0.5f);
    const float square = r * r, first = r + 1.0f;
    p = fma(p, square, first);
    return p * as_type<float>((uint)((int)n + 127) << 23);
}

// g * sigmoid(alpha * g) * (u + 1), or silu(g) * u. A limit that is no number clamps nothing, and adding -0 changes nothing.
inline float activation(float gate, float up, float limit, float alpha) {
    gate = limit < gate ? limit : gate;
    up = limit < up ? limit : up;
    up = -limit > up ? -limit : up;
    const float denominator = 1.0f + exponential(gate * -alpha);
    return gate / denominator * (up + (limit == limit ? 1.0f : -0.0f));
}

// What a simdgroup computes: some rows of a group, and a panel.
struct Tile {
    device const Group *group;
    uint row;
    uint panel;
    bool is_none;
};

template <int ROWS>
inline Tile find_tile(device const Group *groups, uint count, bool is_down, thread const Position &here) {
    // The last group that begins at or before this block.
    uint low = 0, high = count;
    while (high - low > 1) {
        const uint middle = (low + high) / 2;
        if ((is_down ? groups[middle].blocks_before_down : groups[middle].blocks_before_up) <= here.block)
            low = middle;
        else
            high = middle;
    }
    device const Group *group = groups + low;
    const uint block = here.block - (is_down ? group->blocks_before_down : group->blocks_before_up);
    const uint tiles = (group->rows + ROWS - 1) / ROWS;
    const uint row_blocks = (tiles + (1u << group->side) - 1) >> group->side;
    // Blocks that read the same weights follow each other.
    const uint tile = ((block % row_blocks) << group->side) + (here.warp & ((1u << group->side) - 1));
    const uint panel = block / row_blocks * (here.warps >> group->side) + (here.warp >> group->side);
    const uint panels = is_down ? (group->hidden_size + 15) / 16 : group->inner_size / 8;
    Tile found = {group, tile * ROWS, panel, tile >= tiles || panel >= panels};
    return found;
}

// The rows of a tile times a panel. Rows that are not there are computed as the last one is, and not written.
template <class Dtype, int ROWS>
inline void multiply(thread const Tile &tile, device const uint4 *panels, device const float *x, uint width, uint number, thread float *outputs) {
    const uint lane = number % CHUNK;
    const uint chunks = (width + CHUNK - 1) / CHUNK, octets = (chunks + OCTET - 1) / OCTET;
    Rows<ROWS> rows;
    Sums<ROWS> sums;
    UNROLL for (int row = 0; row < ROWS; row++) {
        const uint at = tile.row + row < tile.group->rows ? tile.row + row : tile.group->rows - 1;
        rows.at[row] = x + (ulong)at * (chunks * CHUNK) + lane;
        UNROLL for (int column = 0; column < COLUMNS; column++) sums.of[row][column] = 0.0f;
    }
    // Scales take whole lines of 128 bytes.
    const uint values = octets * (Dtype::VECTORS * 32), scales = (octets * Dtype::SCALE_BYTES + 127) / 128 * 8;
    device const uint4 *panel = panels + (ulong)tile.panel * (values + scales);
    add_products<Dtype, ROWS>(panel + number, panel + values, number / CHUNK, chunks, rows, sums);
    UNROLL for (int row = 0; row < ROWS; row++) outputs[row] = tree(sums.of[row], lane);
}

// inner = activation(gate_proj(x), up_proj(x)), or y = down_proj(inner). Of a half the first four columns are gate's, the others up's.
template <class Dtype, int ROWS>
inline void expert(device const Group *groups, uint count, device const float *input, device float *output, bool is_down, thread const Position &here) {
    const Tile tile = find_tile<ROWS>(groups, count, is_down, here);
    if (tile.is_none) return;
    device const Group *group = tile.group;
    float outputs[ROWS];
    multiply<Dtype, ROWS>(
        tile, is_down ? group->down : group->gate_up, input + (is_down ? group->inner : group->x),
        is_down ? group->inner_size : group->hidden_size, here.number, outputs);
    const uint which = here.number / 16, column = here.number / 4 % 2 * 2 + here.number / 2 % 2;
    device const float *biases = group->biases;
    if (is_down) {
        const uint number = tile.panel * 16 + which * 8 + here.number / 8 % 2 * 4 + column;
        if (here.number % 2 || number >= group->hidden_size) return;
        const float bias = biases ? fetch(biases + 2 * group->inner_size + number) : -0.0f;
        UNROLL for (int row = 0; row < ROWS; row++) {
            if (tile.row + row < group->rows)
                output[group->y + (ulong)(tile.row + row) * group->hidden_size + number] = outputs[row] + bias;
        }
    } else {
        const uint number = tile.panel * 8 + which * 4 + column;
        const float gate_bias = biases ? fetch(biases + number) : -0.0f;
        const float up_bias = biases ? fetch(biases + group->inner_size + number) : -0.0f;
        UNROLL for (int row = 0; row < ROWS; row++) {
            const float up = simd_shuffle_xor(outputs[row], ushort(8));
            if (here.number % 2 == 0 && here.number / 8 % 2 == 0 && tile.row + row < group->rows)
                output[group->inner + (ulong)(tile.row + row) * group->inner_size + number] =
                    activation(outputs[row] + gate_bias, up + up_bias, group->limit, group->alpha);
        }
    }
}

// Few rows are limited by reading weights, which takes many small blocks; many by multiplying, which takes large tiles.
#define KERNEL(name, weights, rows, threads)                                                                                          \
    [[kernel, max_total_threads_per_threadgroup(threads)]] void expert_##name##_##rows(                                               \
        device const Group *groups [[buffer(0)]], constant uint &count [[buffer(1)]], device const float *input [[buffer(2)]],        \
        device float *output [[buffer(3)]], constant uint &is_down [[buffer(4)]], uint block [[threadgroup_position_in_grid]],        \
        uint warp [[simdgroup_index_in_threadgroup]], uint warps [[simdgroups_per_threadgroup]],                                      \
        uint number [[thread_index_in_simdgroup]]) {                                                                                  \
        const Position here = {block, warp, warps, number};                                                                           \
        expert<weights, rows>(groups, count, input, output, is_down != 0, here);                                                      \
    }

// `Dtype` in model/src/cards/dtype.rs has the same.
#define KERNELS(rows, threads)                                                                                                        \
    KERNEL(f32, F32, rows, threads)                                                                                                   \
    KERNEL(f16, SixteenBits<F16Bits>, rows, threads)                                                                                  \
    KERNEL(bf16, SixteenBits<Bf16Bits>, rows, threads)                                                                                \
    KERNEL(q8_0, Q8_0, rows, threads)                                                                                                 \
    KERNEL(q4_k, Q4K, rows, threads)                                                                                                  \
    KERNEL(fp8, Fp8, rows, threads)                                                                                                   \
    KERNEL(mxfp4, Mxfp4, rows, threads)

KERNELS(2, 64)
KERNELS(8, 256)
