// The machine that runs a kernel: fibers for threads, warps and blocks of them. See emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "emulation.h"

#if !defined(__x86_64__)
#define EMULATION_UCONTEXT  // switches stacks with the system's help: slower
#endif
#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulation {

#if !defined(EMULATION_UCONTEXT)
struct Context {
    void* stack_pointer = nullptr;
};
#else
struct Context {
    ucontext_t machine;
};
#endif

constexpr size_t STACK = 256 << 10;  // of address space; only what is touched becomes memory

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

enum class State { fresh, ready, at_warp, at_barrier, waiting, done };

// A wgmma as one warp issued it, and accumulators that wait for one: see hopper.h.
struct Product {
    int width;
    bool brain;
    float* accumulator;  // of lane 0
    const unsigned* rows[WARP];
    unsigned long long a, b;
    bool add, columns;
};
struct Accumulator {
    float* key;  // that of lane 0
    float* of[WARP];
    std::vector<float> sums;  // [16, N]
    int products = 0;         // that are not done
};
struct Products {
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;  // committed, not waited for
    std::vector<Accumulator> accumulators;
    bool fenced = false;
};

struct Warp {
    int lanes = 0, arrived = 0, first = 0;
    Operation operation = nullptr;
    void* operands[WARP];
    Products products;
};

struct Fiber : Thread {
    Context context;
    State state;
    Warp* warp;
    int stack;
    std::vector<Copy> copies;             // that it asked for, in order; of them `arrived` have been waited for
    std::vector<size_t> committed;        // by group not waited for: how many copies there are up to its end
    size_t arrived = 0;
    bool alone = false;                   // copies have arrived, and no barrier has shown them to other lanes
    std::vector<size_t> landed;           // chunks of shared memory that arrived and were not fenced
    bool (*condition)(Fiber&) = nullptr;  // what a waiting fiber waits for
    void* subject = nullptr;
    unsigned value = 0;
};

struct NamedBarrier {
    int threads = 0, arrived = 0;
    unsigned generation = 0;
};

struct Random {
    uint64_t state;
    unsigned below(unsigned limit) {  // the upper half of a linear congruential generator (Knuth's MMIX)
        state = state * 6364136223846793005u + 1442695040888963407u;
        return unsigned(state >> 33) % limit;
    }
};

// The warp that runs, and the order of its lanes after their last operation.
struct Turn {
    Warp* warp;
    unsigned start, step;
    int passed;
    bool ran;
};

struct Machine {
    Context scheduler;
    std::vector<Fiber> fibers;  // of them the first `threads`
    std::vector<Warp> warps;
    int threads = 0;
    Random random;
    Turn turn;
    unsigned round = 0;  // how often all warps had their turn
    unsigned mood = 0;   // of a block: at which arrivals others come first
    char* stacks = nullptr;
    size_t stacks_held = 0;
    std::vector<int> free_stacks;
    size_t shared_bytes = 0;
    std::vector<bool> unfenced;  // by 16 bytes of shared memory: written by cp.async, no fence for the other proxy since
    NamedBarrier named[16];
    bool deferred = false;
    Body body{};
    const char* error = nullptr;
};
static Machine inner;  // what kernels do not see of `machine`

static Fiber& current() { return *static_cast<Fiber*>(machine.current); }

static void yield();
// Until `condition` holds of the fiber's `subject` and `value`.
static void wait_until(bool (*condition)(Fiber&), void* subject, unsigned value);

}  // namespace emulation
