// The machine that runs a kernel: fibers for threads, warps and blocks of them, launches. See emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#define EMULATION_UCONTEXT  // switches stacks with the system's help: slower
#endif
#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

#define HIDDEN __attribute__((visibility("hidden")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

extern "C" {
extern char __start_kernel_shared[] __attribute__((weak)) HIDDEN;
extern char __stop_kernel_shared[] __attribute__((weak)) HIDDEN;
}

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
constexpr int WARP = 32;

using Operation = void (*)(void** lanes);  // carries out a warp operation, given each lane's operands

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

enum class State { ready, at_warp, at_barrier, waiting, done };

struct Warp;

// A wgmma as one warp issued it, and accumulators that wait for one: see hopper.h.
struct Product {
    void (*multiply)(Warp&, const Product&);
    float* accumulator;  // of lane 0
    const unsigned* rows[WARP];
    unsigned long long a, b;
    bool add, columns;
};
struct Accumulator {
    float* of[WARP];
    std::vector<float> sums;  // [16, N]
    int products = 0;         // that are not done
};
struct Products {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;  // committed, not waited for
    std::map<float*, Accumulator> accumulators;
    bool fenced = false;
};

struct Warp {
    int lanes = 0, arrived = 0, first = 0;
    Operation operation = nullptr;
    void* operands[WARP];
    Products products;
};

struct Fiber {
    Context context;
    State state;
    dim3 thread;
    int lane;
    Warp* warp;
    std::vector<std::vector<Copy>> groups;  // committed, not waited for; the last one is open
    std::vector<size_t> landed;             // chunks of shared memory that arrived and were not fenced
    bool (*condition)(Fiber&) = nullptr;    // what a waiting fiber waits for
    void* subject = nullptr;
    unsigned value = 0;
};

struct NamedBarrier {
    int threads = 0, arrived = 0;
    unsigned generation = 0;
};

struct Body {
    void (*call)(void* kernel, void** args);
    void* kernel;
    void** args;
};

struct Machine {
    Context scheduler;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber* current = nullptr;
    char* stacks = nullptr;
    size_t stacks_held = 0;
    dim3 block_index, block_size, grid_size;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<bool> unfenced;  // by 16 bytes of shared memory: written by cp.async, no fence for the other proxy since
    NamedBarrier named[16];
    bool deferred = false;
    Body body{};
    const char* error = nullptr;
};
extern Machine machine HIDDEN;  // one for each compiled source

// All in runtime.cpp, which is compiled once and linked with every source.
void yield() HIDDEN;
// Until `condition` holds of the fiber's `subject` and `value`.
void wait_until(bool (*condition)(Fiber&), void* subject, unsigned value) HIDDEN;
[[noreturn]] void fail(const char* message) HIDDEN;
void collective(Operation operation, void* operands) HIDDEN;
const char* run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool deferred, unsigned seed, Body body) HIDDEN;

// -- launching: one exported function a kernel ------------------------------------------------------------------------------

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Args>*>(args[I])...);
}
template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, bool deferred, unsigned seed, void** args) {
    auto enter = [](void* kernel, void** args) {
        call(reinterpret_cast<void (*)(Args...)>(kernel), args, std::index_sequence_for<Args...>());
    };
    return run_grid(grid, block, shared, deferred, seed, {enter, reinterpret_cast<void*>(kernel), args});
}
// The sizes of the arguments, negative for pointers, after their number.
template <typename... Args>
const int* signature(void (*)(Args...)) {
    static const int sizes[] = {int(sizeof...(Args)), (std::is_pointer_v<Args> ? -1 : 1) * int(sizeof(Args))...};
    return sizes;
}

}  // namespace emulation

#define EXPORT_KERNEL(NAME)                                                                                             \
    extern "C" const int* signature_##NAME() { return emulation::signature(NAME); }                                     \
    extern "C" int static_shared_##NAME() { return int(__stop_kernel_shared - __start_kernel_shared); }                  \
    extern "C" const char* launch_##NAME(const unsigned* grid, const unsigned* block, size_t shared, int deferred,       \
                                         unsigned seed, void** args) {                                                  \
        return emulation::launch(NAME, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, deferred,    \
                                 seed, args);                                                                           \
    }
