// Stands in for NVML (libnvidia-ml.so.1) beside emulated.cpp: tells what this process has of the emulated cards, and what other programs
// do there, as the file HANSE_EMULATED_OTHERS says. With HANSE_EMULATED_PID this process has that number, as in a container.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

extern "C" void hanse_emulated_others(unsigned card, size_t *bytes, unsigned *percent);
extern "C" bool hanse_emulated_card(unsigned card, size_t *bytes, size_t *total);

#define API extern "C" __attribute__((visibility("default"))) int
typedef unsigned long long u64;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

struct Memory {
    unsigned version;
    u64 total, reserved, free, used;
};
struct Process {
    unsigned pid;
    u64 bytes;
    unsigned instance, compute_instance;
};
struct Sample {
    unsigned pid;
    u64 time;
    unsigned sm, memory, encoder, decoder;
};
struct Rates {
    unsigned card, memory;
};

// A handle is a card's number and one, as no handle is zero.
static unsigned number(uintptr_t device) { return static_cast<unsigned>(device - 1); }
static unsigned own_pid() {
    const char *pid = std::getenv("HANSE_EMULATED_PID");
    return pid ? static_cast<unsigned>(std::strtoul(pid, nullptr, 10)) : static_cast<unsigned>(getpid());
}
static const unsigned OTHER_PID = 99;

// Copies as the library does: the caller asks first how much there is.
template <typename Item> static int give(const Item *items, unsigned count, unsigned *room, Item *to) {
    const bool fits = to && *room >= count;
    *room = count;
    if (!fits) return count ? INSUFFICIENT_SIZE : SUCCESS;
    return std::memcpy(to, items, count * sizeof(Item)), SUCCESS;
}

API nvmlInit_v2() { return SUCCESS; }
API nvmlShutdown() { return SUCCESS; }
API nvmlSystemGetDriverVersion(char *text, unsigned size) { return std::snprintf(text, size, "550.00"), SUCCESS; }
API nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) { return pid == OTHER_PID ? (std::snprintf(name, size, "/usr/bin/game"), SUCCESS) : NOT_FOUND; }
API nvmlDeviceGetHandleByUUID(const char *uuid, uintptr_t *device) {
    unsigned card;
    size_t bytes, total;
    if (std::sscanf(uuid, "GPU-cacacaca-caca-caca-caca-cacacacaca%2x", &card) != 1 || !hanse_emulated_card(card, &bytes, &total)) return NOT_FOUND;
    return *device = card + 1, SUCCESS;
}
API nvmlDeviceGetMemoryInfo_v2(uintptr_t device, Memory *memory) {
    size_t own, total, others;
    unsigned percent;
    hanse_emulated_card(number(device), &own, &total);
    hanse_emulated_others(number(device), &others, &percent);
    memory->total = total, memory->reserved = 0, memory->used = own + others, memory->free = total - memory->used;
    return SUCCESS;
}
API nvmlDeviceGetComputeRunningProcesses_v3(uintptr_t device, unsigned *room, Process *to) {
    size_t own, total;
    hanse_emulated_card(number(device), &own, &total);
    const Process process = {own_pid(), own, 0, 0};
    return give(&process, own > 0, room, to);
}
API nvmlDeviceGetGraphicsRunningProcesses_v3(uintptr_t device, unsigned *room, Process *to) {
    size_t others;
    unsigned percent;
    hanse_emulated_others(number(device), &others, &percent);
    const Process process = {OTHER_PID, others, 0, 0};
    return give(&process, others > 0, room, to);
}
// This process is always busy, and that must not count.
API nvmlDeviceGetProcessUtilization(uintptr_t device, Sample *to, unsigned *room, u64) {
    size_t own, total, others;
    unsigned percent;
    hanse_emulated_card(number(device), &own, &total);
    hanse_emulated_others(number(device), &others, &percent);
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const u64 time = static_cast<u64>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
    const Sample samples[] = {{OTHER_PID, time, percent, 0, 0, 0}, {own_pid(), time, 95, 0, 0, 0}};
    return give(samples, own > 0 ? 2 : 1, room, to);
}
API nvmlDeviceGetUtilizationRates(uintptr_t, Rates *) { return NOT_SUPPORTED; }
