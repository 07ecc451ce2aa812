// A driver without a card: libcuda.so.1 for tests. It has the functions that hanse calls, keeps a card's memory in the host's, and
// runs the kernels of model/src/cards themselves, thread by thread, so that everything but the hardware is tried: cuda/kernels.cu, or
// metal/kernels.metal where HANSE_METAL is defined. See emulated.sh.
//
// HANSE_EMULATED_CARDS: how many cards (1). HANSE_EMULATED_BYTES: memory of each (4 GiB). HANSE_EMULATED_FAIL: card:launch, such as
// 0:20: that launch of that card fails, and everything that is asked of the card from then on. HANSE_EMULATED_COUNTS: a file that always
// says how many launches, copies to cards and copies from cards there were. HANSE_EMULATED_FLUSH=1: kernels take subnormal floats for zero
// and write none, as on Apple's GPUs.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <xmmintrin.h>

// --- what kernels have, in whichever language ---

struct uint4 {
    unsigned x, y, z, w;
};

// Memory that kernels may read; everything else ends the process, as it would the launch.
static void check_read(const void *at, size_t bytes);

template <class T> static inline T checked_load(const T *from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) {
        std::fprintf(stderr, "a load of %zu bytes from an address that is no multiple of it\n", sizeof(T));
        std::abort();
    }
    check_read(from, sizeof(T));
    return *from;
}
static inline float float_of(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The threads of a warp take turns: each runs until it gives a value to another one. What a function keeps for its caller goes on
// the stack, and the stack is changed.
#ifndef __x86_64__
#error "the emulated card runs on x86-64"
#endif
extern "C" void hanse_switch_stack(void **from, void *to);
asm(R"(
.text
hanse_switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

static thread_local struct Warp {
    void *scheduler, *threads[32];
    std::vector<char> stacks[32];
    float given[32];
    bool done[32];
    int now;
} warp;

static void give_way() { hanse_switch_stack(&warp.threads[warp.now], warp.scheduler); }

// What the thread whose number differs by `mask` gives.
static float exchange(float value, int mask) {
    const int thread = warp.now;
    warp.given[thread] = value;
    give_way();
    const float taken = warp.given[thread ^ mask];
    give_way();
    return taken;
}

// Where a launch, and a thread of it, is.
static thread_local struct {
    unsigned block, thread, threads;
} here;

#ifdef HANSE_METAL
#include "../../model/src/cards/metal/kernels.metal"
#undef device
#undef constant
#undef thread
#undef fetch
#else
#include "as_cuda.h"
#include "../../model/src/cards/cuda/kernels.cu"
#endif

// --- the card ---

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

static size_t setting(const char *name, size_t other) {
    const char *value = std::getenv(name);
    return value ? std::strtoull(value, nullptr, 10) : other;
}

struct Card {
    size_t total = setting("HANSE_EMULATED_BYTES", size_t(4) << 30), used = 0, pinned = 0, launches = 0, fails_at = 0;
    int contexts = 0;
    bool lost = false;
};
static std::mutex mutex;
static std::map<uintptr_t, std::pair<size_t, Card *>> allocated, pinned;

static std::vector<Card> &cards() {
    static std::vector<Card> cards = [] {
        std::vector<Card> made(setting("HANSE_EMULATED_CARDS", 1));
        unsigned card;
        unsigned long long launch;
        const char *fail = std::getenv("HANSE_EMULATED_FAIL");
        if (fail && std::sscanf(fail, "%u:%llu", &card, &launch) == 2 && card < made.size()) made[card].fails_at = launch;
        return made;
    }();
    return cards;
}

static void count(int kind) {
    static std::FILE *file = [] {
        const char *path = std::getenv("HANSE_EMULATED_COUNTS");
        return path ? std::fopen(path, "w") : nullptr;
    }();
    static size_t counts[3];
    if (!file) return;
    std::lock_guard<std::mutex> lock(mutex);
    counts[kind]++;
    std::rewind(file);
    std::fprintf(file, "%zu %zu %zu\n", counts[0], counts[1], counts[2]);
    std::fflush(file);
}

// What the driver takes of a card for a context, in bytes.
static const size_t CONTEXT = setting("HANSE_EMULATED_CONTEXT", 0);

static size_t used(const Card &card) { return card.used + (card.contexts ? CONTEXT : 0); }

// What other programs do, as the file HANSE_EMULATED_OTHERS has it: a line for each card with its number, bytes, and percent of the time.
extern "C" __attribute__((visibility("default"))) void hanse_emulated_others(unsigned card, size_t *bytes, unsigned *percent) {
    *bytes = *percent = 0;
    const char *name = std::getenv("HANSE_EMULATED_OTHERS");
    std::FILE *file = name ? std::fopen(name, "r") : nullptr;
    if (!file) return;
    unsigned number, share;
    for (size_t taken; std::fscanf(file, "%u %zu %u", &number, &taken, &share) == 3;)
        if (number == card) *bytes = taken, *percent = share;
    std::fclose(file);
}

// What this process has of a card, and the card in all.
extern "C" __attribute__((visibility("default"))) bool hanse_emulated_card(unsigned card, size_t *bytes, size_t *total) {
    std::lock_guard<std::mutex> lock(mutex);
    return card < cards().size() && (*bytes = used(cards()[card]), *total = cards()[card].total, true);
}

static size_t others(const Card &card) {
    size_t bytes;
    unsigned percent;
    return hanse_emulated_others(static_cast<unsigned>(&card - cards().data()), &bytes, &percent), bytes;
}

// Tells the file HANSE_EMULATED_LOG when this process has the first byte of a card, of its memory or pinned for it, or none any more:
// the card's number, what it has, and the time in milliseconds.
static void log(const Card &card, bool had) {
    const bool has = used(card) + card.pinned > 0;
    const char *name = std::getenv("HANSE_EMULATED_LOG");
    std::FILE *file = name && has != had ? std::fopen(name, "a") : nullptr;
    if (!file) return;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    std::fprintf(file, "%u %s %lld\n", static_cast<unsigned>(&card - cards().data()), has ? "some" : "none",
                 static_cast<long long>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count()));
    std::fclose(file);
}

// Changes what this process has of a card.
template <typename Change> static void change(Card &card, Change change) {
    const bool had = used(card) + card.pinned > 0;
    change();
    log(card, had);
}

static thread_local Card *current;
struct Stream {
    Card *card;
};

static void check_read(const void *at, size_t bytes) {
    static thread_local uintptr_t first = 0, last = 0;
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    if (address >= first && address + bytes <= last) return;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = allocated.upper_bound(address);
    if (found != allocated.begin() && address + bytes <= (--found)->first + found->second.first && found->second.second == current) {
        first = found->first;
        last = found->first + found->second.first;
        return;
    }
    std::fprintf(stderr, "a kernel reads %zu bytes that are not the card's\n", bytes);
    std::abort();
}

#ifdef HANSE_METAL
typedef void (*KernelFunction)(const Group *, const unsigned &, const float *, float *, const unsigned &, unsigned, unsigned, unsigned, unsigned);
#else
typedef void (*KernelFunction)(const Group *, unsigned, const float *, float *, unsigned);
#endif
#define ENTRY(name, rows) {"expert_" #name "_" #rows, expert_##name##_##rows}
#define BOTH(name) ENTRY(name, 2), ENTRY(name, 8)
static const std::map<std::string, KernelFunction> KERNELS_BY_NAME = {BOTH(f32), BOTH(f16), BOTH(bf16), BOTH(q8_0), BOTH(q4_k), BOTH(fp8), BOTH(mxfp4)};

static thread_local struct Call {
    KernelFunction function;
    const Group *groups;
    unsigned count;
    const float *input;
    float *output;
    unsigned is_down;
} call;

static void thread_body() {
#ifdef HANSE_METAL
    call.function(call.groups, call.count, call.input, call.output, call.is_down, here.block, here.thread / 32, here.threads / 32, here.thread % 32);
#else
    call.function(call.groups, call.count, call.input, call.output, call.is_down);
#endif
    warp.done[warp.now] = true;
    give_way();
}

static void run_warp(unsigned first_thread) {
    for (int i = 0; i < 32; i++) {
        warp.done[i] = false;
        warp.stacks[i].resize(64 << 10);
        uintptr_t top = reinterpret_cast<uintptr_t>(warp.stacks[i].data() + warp.stacks[i].size()) & ~uintptr_t(15);
        // Six registers, where to begin, and where that would return to.
        void **stack = reinterpret_cast<void **>(top) - 8;
        std::memset(stack, 0, 8 * sizeof(void *));
        stack[6] = reinterpret_cast<void *>(thread_body);
        warp.threads[i] = stack;
    }
    for (int left = 32; left > 0;) {
        left = 0;
        for (warp.now = 0; warp.now < 32; warp.now++) {
            if (warp.done[warp.now]) continue;
            here.thread = first_thread + warp.now;
            hanse_switch_stack(&warp.scheduler, warp.threads[warp.now]);
            left += !warp.done[warp.now];
        }
    }
}

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define ALIVE() do { if (!current) return INVALID_VALUE; if (current->lost) return LAUNCH_FAILED; } while (0)

API cuInit(unsigned) { return cards().empty() ? 100 : SUCCESS; }
API cuDriverGetVersion(int *version) { return *version = 12040, SUCCESS; }
API cuGetErrorName(CUresult error, const char **text) { return *text = error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR", SUCCESS; }
API cuGetErrorString(CUresult error, const char **text) { return *text = error == LAUNCH_FAILED ? "unspecified launch failure" : error == 100 ? "no CUDA-capable device is detected" : "an error", SUCCESS; }
API cuDeviceGetCount(int *count) { return *count = static_cast<int>(cards().size()), SUCCESS; }
API cuDeviceGet(int *device, int number) { return *device = number, number < static_cast<int>(cards().size()) ? SUCCESS : INVALID_VALUE; }
API cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, size, "Emulated card"), SUCCESS; }
API cuDeviceGetAttribute(int *value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, SUCCESS; }
API cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return std::memset(uuid, 0xca, 16), uuid[15] = static_cast<unsigned char>(device), SUCCESS; }
API cuDevicePrimaryCtxRetain(void **context, int device) {
    std::lock_guard<std::mutex> lock(mutex);
    Card &card = cards()[device];
    if (!card.contexts && CONTEXT + others(card) > card.total) return OUT_OF_MEMORY;
    change(card, [&] { card.contexts++; });
    return *context = &card, SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    std::lock_guard<std::mutex> lock(mutex);
    Card &card = cards()[device];
    if (card.contexts == 0) std::abort();
    // What is left when a context goes would be freed with it, and whoever frees it later would free what is not there.
    if (card.contexts == 1 && card.used + card.pinned) std::abort();
    return change(card, [&] { card.contexts--; }), SUCCESS;
}
API cuCtxSetCurrent(void *context) { return current = static_cast<Card *>(context), SUCCESS; }
API cuMemGetInfo_v2(size_t *free, size_t *total) {
    ALIVE();
    std::lock_guard<std::mutex> lock(mutex);
    const size_t taken = used(*current) + others(*current);
    return *free = current->total - std::min(current->total, taken), *total = current->total, SUCCESS;
}
API cuMemAlloc_v2(uintptr_t *at, size_t bytes) {
    ALIVE();
    std::lock_guard<std::mutex> lock(mutex);
    if (used(*current) + others(*current) + bytes > current->total) return OUT_OF_MEMORY;
    // Whoever reads what nobody wrote gets no zeros.
    void *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);
    allocated[*at = reinterpret_cast<uintptr_t>(memory)] = {bytes, current};
    return change(*current, [&] { current->used += bytes; }), SUCCESS;
}
API cuMemFree_v2(uintptr_t at) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = allocated.find(at);
    if (found == allocated.end()) std::abort();
    Card &card = *found->second.second;
    change(card, [&] { card.used -= found->second.first; });
    allocated.erase(found);
    std::free(reinterpret_cast<void *>(at));
    return SUCCESS;
}
API cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    ALIVE();
    std::lock_guard<std::mutex> lock(mutex);
    if (!(*at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096))) return OUT_OF_MEMORY;
    pinned[reinterpret_cast<uintptr_t>(*at)] = {bytes, current};
    return change(*current, [&] { current->pinned += bytes; }), SUCCESS;
}
API cuMemFreeHost(void *at) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = pinned.find(reinterpret_cast<uintptr_t>(at));
    if (found == pinned.end()) std::abort();
    Card &card = *found->second.second;
    change(card, [&] { card.pinned -= found->second.first; });
    pinned.erase(found);
    return std::free(at), SUCCESS;
}
API cuStreamCreate(Stream **stream, unsigned) { ALIVE(); return *stream = new Stream{current}, SUCCESS; }
API cuStreamDestroy_v2(Stream *stream) { return delete stream, SUCCESS; }
API cuStreamSynchronize(Stream *stream) { return stream->card->lost ? LAUNCH_FAILED : SUCCESS; }
static CUresult copy(Stream *stream, void *to, const void *from, size_t bytes, uintptr_t on_card) {
    ALIVE();
    if (stream->card != current) return INVALID_VALUE;
    // An empty copy is of nothing.
    if (bytes) check_read(reinterpret_cast<void *>(on_card), bytes);
    return std::memcpy(to, from, bytes), SUCCESS;
}
API cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, Stream *stream) { return count(1), copy(stream, reinterpret_cast<void *>(to), from, bytes, to); }
API cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, Stream *stream) { return count(2), copy(stream, to, reinterpret_cast<const void *>(from), bytes, from); }
API cuModuleLoadData(void **module, const void *text) { return *module = const_cast<void *>(text), std::strstr(static_cast<const char *>(text), ".version") ? SUCCESS : INVALID_VALUE; }
API cuModuleUnload(void *) { return SUCCESS; }
API cuModuleGetFunction(const KernelFunction **function, void *, const char *name) {
    auto found = KERNELS_BY_NAME.find(name);
    return found == KERNELS_BY_NAME.end() ? NOT_FOUND : (*function = &found->second, SUCCESS);
}
API cuLaunchKernel(const KernelFunction *function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, Stream *stream, void **arguments, void **) {
    ALIVE();
    if (stream->card != current || blocks == 0 || threads == 0 || threads % 32) return INVALID_VALUE;
    count(0);
    if (++current->launches == current->fails_at) {
        current->lost = true;
        // As on a card, the launch is accepted; whoever waits for it hears of it.
        return SUCCESS;
    }
    call = {*function, *static_cast<const Group **>(arguments[0]), *static_cast<unsigned *>(arguments[1]), *static_cast<const float **>(arguments[2]), *static_cast<float **>(arguments[3]), *static_cast<unsigned *>(arguments[4])};
    static const bool flushes = setting("HANSE_EMULATED_FLUSH", 0);
    const unsigned control = _mm_getcsr();
    if (flushes) _mm_setcsr(control | 0x8040);
    here.threads = threads;
    for (here.block = 0; here.block < blocks; here.block++)
        for (unsigned thread = 0; thread < threads; thread += 32) run_warp(thread);
    _mm_setcsr(control);
    return SUCCESS;
}
