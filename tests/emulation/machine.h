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

#include <sys/mman.h>

#if !defined(__x86_64__)
#define EMULATION_UCONTEXT  // switches stacks with the system's help: slower
#endif
#if defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

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
static Machine machine;

inline void yield() { switch_context(machine.current->context, machine.scheduler); }

// Until `condition` holds of the fiber's `subject` and `value`.
inline void wait_until(bool (*condition)(Fiber&), void* subject, unsigned value) {
    Fiber& fiber = *machine.current;
    fiber.condition = condition, fiber.subject = subject, fiber.value = value;
    if (condition(fiber)) return;
    fiber.state = State::waiting;
    yield();
}

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
    m.unfenced.assign((shared_bytes + 15) / 16, false);
    for (NamedBarrier& barrier : m.named) barrier = {};
    for (Warp& warp : m.warps) warp.arrived = 0, warp.products = {};
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = m.fibers[i];
        fiber.state = State::ready;
        fiber.groups.assign(1, {});
        fiber.landed.clear();
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
                    if (m.current->state == State::waiting && m.current->condition(*m.current))
                        m.current->state = State::ready;
                    if (m.current->state != State::ready) continue;
                    ran = true;
                    switch_context(m.scheduler, m.current->context);
                    if (m.error) return;
                }
            }
        }
        bool goes_on = false;  // by what a later warp did
        for (Fiber& fiber : m.fibers) {
            waiting += fiber.state == State::at_barrier, done += fiber.state == State::done;
            goes_on |= fiber.state == State::waiting && fiber.condition(fiber);
        }
        if (done == threads) {
            for (NamedBarrier& barrier : m.named)
                if (barrier.arrived) m.error = "a named barrier is left with arrivals that nobody waited for";
            return;
        }
        if (goes_on) continue;
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
    m.shared = static_cast<char*>(std::malloc(shared_bytes + !shared_bytes)), m.shared_bytes = shared_bytes;
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
    extern "C" int static_shared_##NAME() { return int(__stop_kernel_shared - __start_kernel_shared); }                  \
    extern "C" const char* launch_##NAME(const unsigned* grid, const unsigned* block, size_t shared, int deferred,       \
                                         unsigned seed, void** args) {                                                  \
        return emulation::launch(NAME, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, deferred,    \
                                 seed, args);                                                                           \
    }
