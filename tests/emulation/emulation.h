// CUDA's execution model on one CPU thread: included ahead of a kernel's unchanged source, it makes that source C++.
//
// Each CUDA thread is a fiber. A fiber runs until it has to wait for others: at __syncthreads for its block, at a shuffle,
// mma, ldmatrix or __syncwarp for its warp. The last lane to arrive at such a warp operation carries it out for all.
// Warps run one after another, each as far as it gets, in an order drawn anew from the seed after every barrier: the
// most lopsided interleaving that the barriers allow, so that a missing one shows.
//
// Shared memory holds NaN (all bits set) when a block starts. cp.async is *eager* (it copies at once: what it must not
// overwrite yet is lost) or *deferred* (it writes NaN, and copies when the thread waits for the group: what is read too
// early is NaN).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include <sys/mman.h>

#if !defined(__x86_64__)
#define EMULATION_UCONTEXT  // switches stacks with the system's help: slower
#endif
#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

// -- the language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("kernel_shared")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned x) {
    float result;
    std::memcpy(&result, &x, 4);
    return result;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned result;
    std::memcpy(&result, &x, 4);
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

// -- fibers -------------------------------------------------------------------------------------------------------------

extern "C" {
extern char __start_kernel_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_kernel_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulation {

#if !defined(EMULATION_UCONTEXT)
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void slimrt_emulation_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden slimrt_emulation_switch
.globl slimrt_emulation_switch
.type slimrt_emulation_switch, @function
slimrt_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size slimrt_emulation_switch, .-slimrt_emulation_switch
)");
inline void switch_context(Context& from, Context& to) {
    slimrt_emulation_switch(&from.stack_pointer, to.stack_pointer);
}
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    // Six saved registers, the address that `ret` takes, and the alignment that a called function expects.
    void** top = reinterpret_cast<void**>(stack + size) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top;
}
#else
struct Context {
    ucontext_t machine;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack;
    context.machine.uc_stack.ss_size = size;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
}
#endif

constexpr size_t STACK = 256 << 10;  // of address space; only what is touched becomes memory
constexpr int WARP = 32;

using Operation = void (*)(void** lanes);  // carries out a warp operation, given each lane's operands

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

enum class State { ready, at_warp, at_barrier, done };

struct Warp {
    int lanes = 0, arrived = 0, first = 0;
    Operation operation = nullptr;
    void* operands[WARP];
};

struct Fiber {
    Context context;
    State state;
    dim3 thread;
    int lane;
    Warp* warp;
    std::vector<std::vector<Copy>> groups;  // committed, not waited for; the last one is open
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
    bool deferred = false;
    Body body{};
    const char* error = nullptr;
};
static Machine machine;

inline void yield() { switch_context(machine.current->context, machine.scheduler); }

[[noreturn]] inline void fail(const char* message) {
    machine.error = message;
    for (;;) yield();
}

// Not instrumented: it never returns, so a red zone of its frame would stay behind on the stack.
__attribute__((no_sanitize("address"))) static void fiber_main() {
    machine.body.call(machine.body.kernel, machine.body.args);
    machine.current->state = State::done;
    for (;;) yield();
}

inline void collective(Operation operation, void* operands) {
    Warp& warp = *machine.current->warp;
    if (warp.arrived && warp.operation != operation) fail("lanes of one warp meet in different operations");
    warp.operation = operation;
    warp.operands[machine.current->lane] = operands;
    if (++warp.arrived < warp.lanes) {
        machine.current->state = State::at_warp;
        yield();
        return;
    }
    warp.arrived = 0;
    operation(warp.operands);
    for (int lane = 0; lane < warp.lanes; lane++) machine.fibers[warp.first + lane].state = State::ready;
}

struct Random {
    uint64_t state;
    unsigned below(unsigned limit) {  // the upper half of a linear congruential generator (Knuth's MMIX)
        state = state * 6364136223846793005u + 1442695040888963407u;
        return unsigned(state >> 33) % limit;
    }
};

static void run_block(Random& random, size_t shared_bytes) {
    Machine& m = machine;
    const int threads = int(m.fibers.size());
    std::memset(m.shared, 0xff, shared_bytes);
    if (__start_kernel_shared) std::memset(__start_kernel_shared, 0xff, __stop_kernel_shared - __start_kernel_shared);
    for (Warp& warp : m.warps) warp.arrived = 0;
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = m.fibers[i];
        fiber.state = State::ready;
        fiber.groups.assign(1, {});
        prepare(fiber.context, m.stacks + size_t(i) * STACK, STACK, fiber_main);
    }
    std::vector<int> order(m.warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = int(i);
    for (;;) {
        for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[random.below(unsigned(i) + 1)]);
        int waiting = 0, done = 0;
        for (int number : order) {
            Warp& warp = m.warps[number];
            for (bool ran = true; ran;) {
                ran = false;
                for (int lane = 0; lane < warp.lanes; lane++) {
                    m.current = &m.fibers[warp.first + lane];
                    if (m.current->state != State::ready) continue;
                    ran = true;
                    switch_context(m.scheduler, m.current->context);
                    if (m.error) return;
                }
            }
        }
        for (Fiber& fiber : m.fibers) waiting += fiber.state == State::at_barrier, done += fiber.state == State::done;
        if (done == threads) return;
        if (waiting + done < threads) {
            m.error = "deadlock: a warp operation or barrier that not all threads reach";
            return;
        }
        for (Fiber& fiber : m.fibers)
            if (fiber.state == State::at_barrier) fiber.state = State::ready;
    }
}

inline const char* run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool deferred, unsigned seed, Body body) {
    Machine& m = machine;
    const int threads = int(block.x * block.y * block.z);
    if (m.stacks_held < threads * STACK) {
        if (m.stacks) munmap(m.stacks, m.stacks_held);
        m.stacks_held = threads * STACK;
        m.stacks = static_cast<char*>(
            mmap(nullptr, m.stacks_held, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (m.stacks == MAP_FAILED) return m.stacks = nullptr, m.stacks_held = 0, "no memory for the threads' stacks";
    }
    m.fibers = std::vector<Fiber>(threads);
    m.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    for (int i = 0; i < threads; i++) {
        Warp& warp = m.warps[i / WARP];
        if (!warp.lanes++) warp.first = i;
        Fiber& fiber = m.fibers[i];
        fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        fiber.lane = i % WARP;
        fiber.warp = &warp;
    }
    m.grid_size = grid, m.block_size = block, m.deferred = deferred, m.body = body, m.error = nullptr;
    m.shared = static_cast<char*>(std::malloc(shared_bytes + !shared_bytes));
    Random random{seed};
    for (unsigned z = 0; z < grid.z && !m.error; z++)
        for (unsigned y = 0; y < grid.y && !m.error; y++)
            for (unsigned x = 0; x < grid.x && !m.error; x++) {
                m.block_index = {x, y, z};
                run_block(random, shared_bytes);
            }
    std::free(m.shared);
    if (m.error) {  // frames were left in mid-air: these stacks are not used again
        munmap(m.stacks, m.stacks_held);
        m.stacks = nullptr, m.stacks_held = 0;
    }
    return m.error;
}

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
    extern "C" const char* launch_##NAME(const unsigned* grid, const unsigned* block, size_t shared, int deferred,       \
                                         unsigned seed, void** args) {                                                  \
        return emulation::launch(NAME, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, deferred,    \
                                 seed, args);                                                                           \
    }

// -- built-in variables and functions -----------------------------------------------------------------------------------------

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)

inline void __syncthreads() {
    emulation::machine.current->state = emulation::State::at_barrier;
    emulation::yield();
}
inline void __syncwarp(unsigned = ~0u) {
    emulation::collective([](void**) {}, nullptr);
}

namespace emulation {
template <typename V>
struct Shuffle {
    V value, result;
    int source;
};
template <typename V>
V shuffle(V value, int source) {
    Shuffle<V> mine{value, value, source};
    collective(
        [](void** lanes) {
            for (int lane = 0; lane < machine.current->warp->lanes; lane++) {
                auto& to = *static_cast<Shuffle<V>*>(lanes[lane]);
                if (to.source >= 0 && to.source < machine.current->warp->lanes)
                    to.result = static_cast<Shuffle<V>*>(lanes[to.source])->value;
            }
        },
        &mine);
    return mine.result;
}
}  // namespace emulation

template <typename V>
V __shfl_sync(unsigned, V value, int source) {
    return emulation::shuffle(value, source);
}
template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
    return emulation::shuffle(value, emulation::machine.current->lane ^ mask);
}
template <typename V>
V __shfl_up_sync(unsigned, V value, int delta) {
    return emulation::shuffle(value, emulation::machine.current->lane - delta);
}
template <typename V>
V __shfl_down_sync(unsigned, V value, int delta) {
    return emulation::shuffle(value, emulation::machine.current->lane + delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    struct Ballot {
        int predicate;
        unsigned result;
    } mine{predicate, 0};
    emulation::collective(
        [](void** lanes) {
            unsigned votes = 0;
            const int count = emulation::machine.current->warp->lanes;
            for (int i = 0; i < count; i++) votes |= unsigned(static_cast<Ballot*>(lanes[i])->predicate != 0) << i;
            for (int i = 0; i < count; i++) static_cast<Ballot*>(lanes[i])->result = votes;
        },
        &mine);
    return mine.result;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

// -- the twins of ptx.cuh -------------------------------------------------------------------------------------------------------

#define SLIMRT_PTX_CUH
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = reinterpret_cast<TYPE*>(emulation::machine.shared)
#define FLOAT_INFINITY __int_as_float(0x7f800000)
#define FULL_WARP 0xffffffffu

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

namespace emulation {
struct Halves {
    std::vector<float> of;
    Halves() : of(65536) {
        for (unsigned bits = 0; bits < 65536; bits++) {
            const int exponent = bits >> 10 & 31, fraction = bits & 1023;
            float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction | 1024), exponent - 25);
            of[bits] = bits >> 15 ? -value : value;
        }
    }
};
static const Halves halves;
}  // namespace emulation

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return emulation::halves.of[x.bits]; }
inline float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <typename TO>
TO from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline f16 from_float<f16>(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: a sum whose last place is 2^-24 rounds as it should
        const float sum = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<unsigned short>(sign | (__float_as_uint(sum) - 0x3f000000))};
    }
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<unsigned short>(sign | ((rounded >> 13) - (112 << 10)))};
}
template <>
inline bf16 from_float<bf16>(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <typename TO>
unsigned pack(float low, float high) {
    return from_float<TO>(low).bits | unsigned(from_float<TO>(high).bits) << 16;
}

namespace emulation {
inline double half_of(unsigned pair, int i) { return to_float(f16{static_cast<unsigned short>(pair >> 16 * i)}); }
}  // namespace emulation
inline unsigned sub_f16x2(unsigned a, unsigned b) {
    using emulation::half_of;
    return pack<f16>(float(half_of(a, 0) - half_of(b, 0)), float(half_of(a, 1) - half_of(b, 1)));
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    using emulation::half_of;
    return pack<f16>(float(half_of(a, 0) * half_of(b, 0) + half_of(c, 0)), float(half_of(a, 1) * half_of(b, 1) + half_of(c, 1)));
}

inline float exp2_fast(float x) { return std::exp2(x); }

template <typename HALF>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Mma {
        float* d;
        const unsigned* a;
        unsigned b[2];
    } mine{d, a, {b0, b1}};
    emulation::collective(
        [](void** lanes) {
            auto low = [](unsigned pair) { return to_float(HALF{static_cast<unsigned short>(pair)}); };
            auto high = [](unsigned pair) { return to_float(HALF{static_cast<unsigned short>(pair >> 16)}); };
            float a[16][16], b[16][8], sum[16][8];
            for (int lane = 0; lane < 32; lane++) {
                const Mma& from = *static_cast<Mma*>(lanes[lane]);
                const int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
                    a[row][column] = low(from.a[i]), a[row][column + 1] = high(from.a[i]);
                }
                for (int i = 0; i < 2; i++) {
                    b[2 * t + 8 * i][g] = low(from.b[i]), b[2 * t + 8 * i + 1][g] = high(from.b[i]);
                }
                for (int i = 0; i < 4; i++) sum[g + 8 * (i / 2)][2 * t + i % 2] = from.d[i];
            }
            for (int row = 0; row < 16; row++)
                for (int k = 0; k < 16; k++)
                    for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
            for (int lane = 0; lane < 32; lane++) {
                const int g = lane / 4, t = lane % 4;
                float* to = static_cast<Mma*>(lanes[lane])->d;
                for (int i = 0; i < 4; i++) to[i] = sum[g + 8 * (i / 2)][2 * t + i % 2];
            }
        },
        &mine);
}

namespace emulation {
struct Matrices {
    unsigned* registers;
    const void* row;
};
template <bool TRANSPOSED>
void load_matrices(void** lanes) {
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short values[8][8];
        unsigned banks = 0;  // groups of four, 16 bytes: the eight rows must lie in different ones, or they come in turn
        for (int row = 0; row < 8; row++)
            banks |= 1u << reinterpret_cast<uintptr_t>(static_cast<Matrices*>(lanes[8 * matrix + row])->row) / 16 % 8;
        if (banks != 255) fail("ldmatrix: rows of one matrix lie in the same banks");
        for (int row = 0; row < 8; row++)
            std::memcpy(values[row], static_cast<Matrices*>(lanes[8 * matrix + row])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const unsigned low = TRANSPOSED ? values[t][g] : values[g][t];
            const unsigned high = TRANSPOSED ? values[t + 1][g] : values[g][t + 1];
            static_cast<Matrices*>(lanes[lane])->registers[matrix] = low | high << 16;
        }
    }
}
}  // namespace emulation

inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<false>, &mine);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<true>, &mine);
}

inline void cp_async16(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
        emulation::fail("cp.async: an address is not aligned to 16 bytes");
    if (emulation::machine.deferred) {
        std::memset(shared, 0xff, 16);
        emulation::machine.current->groups.back().push_back({shared, global, valid});
    } else if (valid) {
        std::memcpy(shared, global, 16);
    } else {
        std::memset(shared, 0, 16);
    }
}
inline void cp_async_commit() { emulation::machine.current->groups.emplace_back(); }
template <int PENDING>
void cp_async_wait() {
    auto& groups = emulation::machine.current->groups;
    while (int(groups.size()) - 1 > PENDING) {
        for (const emulation::Copy& copy : groups.front()) {
            if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
            else std::memset(copy.shared, 0, 16);
        }
        groups.erase(groups.begin());
    }
}
