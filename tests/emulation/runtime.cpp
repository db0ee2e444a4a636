// What of the emulation no source changes: compiled once, as a library that every source is linked with.
#include "state.h"

#include <sys/mman.h>

#include <cstdio>

// -- the machine --------------------------------------------------------------------------------------------------------

namespace emulation {

#if !defined(EMULATION_UCONTEXT)
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
static void switch_context(Context& from, Context& to) {
    slimrt_emulation_switch(&from.stack_pointer, to.stack_pointer);
}
static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    // Six saved registers, the address that `ret` takes, and the alignment that a called function expects.
    void** top = reinterpret_cast<void**>(stack + size) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry);
    context.stack_pointer = top;
}
#else
static void switch_context(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }
static void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack;
    context.machine.uc_stack.ss_size = size;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, entry, 0);
}
#endif

Running machine;

static void fiber_main();

// The lane of the running warp that comes next, or null: each waits for others, or is done.
static Fiber* next_lane() {
    Turn& turn = inner.turn;
    for (;;) {
        while (turn.passed < WARP) {
            const int lane = int((turn.start + turn.passed++ * turn.step) % WARP);
            if (lane >= turn.warp->lanes) continue;
            Fiber& fiber = inner.fibers[turn.warp->first + lane];
            if (fiber.state == State::waiting && fiber.condition(fiber)) fiber.state = State::ready;
            if (fiber.state != State::ready && fiber.state != State::fresh) continue;
            turn.ran = true;
            return &fiber;
        }
        if (!turn.ran) return nullptr;
        turn = {turn.warp, inner.random.below(WARP), 2 * inner.random.below(WARP / 2) + 1, 0, false};
    }
}

// Go on with `next`, or where it is null with the scheduler; comes back when somebody goes on with `from`. Not
// instrumented, as fiber_main: from a thread that has ended it never returns, and red zones of its frame would stay behind
// on the stack.
__attribute__((no_sanitize("address"))) static void go_on(Context& from, Fiber* next) {
    if (next) machine.current = next;
    if (next && next->state == State::fresh) {
        next->stack = inner.free_stacks.back();
        inner.free_stacks.pop_back();
        // Their tops lie in different sets of the processor's caches.
        const size_t size = STACK - size_t(next->stack % 32) * 1088;
        prepare(next->context, inner.stacks + size_t(next->stack) * STACK, size, fiber_main);
        next->state = State::ready;
    }
    switch_context(from, next ? next->context : inner.scheduler);
}

static void yield() {
    Fiber& fiber = current();
    Fiber* next = inner.error ? nullptr : next_lane();
    if (next != &fiber) go_on(fiber.context, next);
}

static void wait_until(bool (*condition)(Fiber&), void* subject, unsigned value) {
    Fiber& fiber = current();
    fiber.condition = condition, fiber.subject = subject, fiber.value = value;
    if (condition(fiber)) return;
    fiber.state = State::waiting;
    yield();
}

[[noreturn]] void fail(const char* message) {
    inner.error = message;
    for (;;) yield();
}

// Not instrumented: it never returns, so a red zone of its frame would stay behind on the stack.
__attribute__((no_sanitize("address"))) static void fiber_main() {
    for (;;) {
        inner.body.call(inner.body.kernel, inner.body.args);
        Fiber& fiber = current();
        fiber.state = State::done;
        Fiber* next = inner.error ? nullptr : next_lane();
        if (next && next->state == State::fresh) {  // on this stack, whose memory is in the caches
            next->stack = fiber.stack;
            next->state = State::ready;
            machine.current = next;
            continue;
        }
        inner.free_stacks.push_back(fiber.stack);
        go_on(fiber.context, next);
    }
}

void collective(Operation operation, void* operands) {
    Warp& warp = *current().warp;
    if (warp.arrived && warp.operation != operation) fail("lanes of one warp meet in different operations");
    warp.operation = operation;
    warp.operands[machine.current->lane] = operands;
    if (++warp.arrived < warp.lanes) {
        current().state = State::at_warp;
        yield();
        return;
    }
    warp.arrived = 0;
    operation(warp.operands);
    for (int lane = 0; lane < warp.lanes; lane++) inner.fibers[warp.first + lane].state = State::ready;
}

static void run_block(size_t shared_bytes) {
    Machine& m = inner;
    std::memset(machine.shared, 0xff, shared_bytes);
    std::memset(m.body.shared_start, 0xff, m.body.shared_stop - m.body.shared_start);
    m.unfenced.assign((shared_bytes + 15) / 16, false);
    for (NamedBarrier& barrier : m.named) barrier = {};
    for (Warp& warp : m.warps) warp.arrived = 0, warp.products = {};
    m.free_stacks.clear();
    for (int i = 0; i < m.threads; i++) {
        Fiber& fiber = m.fibers[i];
        fiber.state = State::fresh;
        fiber.copies.clear(), fiber.committed.clear(), fiber.landed.clear();
        fiber.arrived = 0;
        m.free_stacks.push_back(m.threads - 1 - i);
    }
    m.mood = m.random.below(1 << 16);
    std::vector<int> order(m.warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = int(i);
    for (;;) {
        for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[m.random.below(unsigned(i) + 1)]);
        int waiting = 0, done = 0;
        for (int number : order) {
            m.turn = {&m.warps[number], 0, 0, WARP, true};
            Fiber* first = next_lane();
            if (!first) continue;
            go_on(m.scheduler, first);  // comes back when no lane can go on
            if (m.error) return;
        }
        m.round++;
        bool goes_on = false;  // by what a later warp did
        for (int i = 0; i < m.threads; i++) {
            Fiber& fiber = m.fibers[i];
            waiting += fiber.state == State::at_barrier, done += fiber.state == State::done;
            goes_on |= fiber.state == State::waiting && (!fiber.subject || fiber.condition(fiber));  // null: it only rests
        }
        if (done == m.threads) {
            for (NamedBarrier& barrier : m.named)
                if (barrier.arrived) m.error = "a named barrier is left with arrivals that nobody waited for";
            return;
        }
        if (goes_on) continue;
        if (waiting + done < m.threads) {
            m.error = "deadlock: a warp operation or barrier that not all threads reach";
            return;
        }
        for (int i = 0; i < m.threads; i++)
            if (m.fibers[i].state == State::at_barrier) m.fibers[i].state = State::ready;
    }
}

// CuPy compiles with -ftz=true: float32 that are too small to be normal are zero, as operands and as results.
#if defined(__SSE__)
struct FlushToZero {
    const unsigned outside = __builtin_ia32_stmxcsr();
    FlushToZero() { __builtin_ia32_ldmxcsr(outside | 0x8040); }
    ~FlushToZero() { __builtin_ia32_ldmxcsr(outside); }
};
#else
struct FlushToZero {};
#endif

const char* run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool deferred, unsigned seed, Body body) {
    Machine& m = inner;
    const int threads = int(block.x * block.y * block.z);
    if (m.stacks_held < threads * STACK) {
        if (m.stacks) munmap(m.stacks, m.stacks_held);
        m.stacks_held = threads * STACK;
        m.stacks = static_cast<char*>(
            mmap(nullptr, m.stacks_held, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (m.stacks == MAP_FAILED) return m.stacks = nullptr, m.stacks_held = 0, "no memory for the threads' stacks";
    }
    if (int(m.fibers.size()) < threads) m.fibers.resize(size_t(threads));
    m.threads = threads;
    m.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    for (int i = 0; i < threads; i++) {
        Warp& warp = m.warps[i / WARP];
        if (!warp.lanes++) warp.first = i;
        Fiber& fiber = m.fibers[i];
        fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        fiber.lane = i % WARP;
        fiber.warp = &warp;
    }
    for (int i = 0; i < threads; i++) m.fibers[i].lanes = m.fibers[i].warp->lanes;
    machine.grid_size = grid, machine.block_size = block;
    m.deferred = deferred, m.body = body, m.error = nullptr;
    machine.shared = static_cast<char*>(std::malloc(shared_bytes + !shared_bytes)), m.shared_bytes = shared_bytes;
    m.random = {seed};
    [[maybe_unused]] const FlushToZero flush;
    for (unsigned z = 0; z < grid.z && !m.error; z++)
        for (unsigned y = 0; y < grid.y && !m.error; y++)
            for (unsigned x = 0; x < grid.x && !m.error; x++) {
                machine.block_index = {x, y, z};
                run_block(shared_bytes);
            }
    std::free(machine.shared);
    if (m.error) {  // frames were left in mid-air: these stacks are not used again
        munmap(m.stacks, m.stacks_held);
        m.stacks = nullptr, m.stacks_held = 0;
    }
    return m.error;
}

}  // namespace emulation

// What g++ calls ahead of a load or store at an address that its type does not allow (-fsanitize=alignment), in the place of
// its own library, which would only report it. A GPU ends the kernel there.
struct BadAddress {
    const char* file;
    unsigned line, column;
};
extern "C" void __ubsan_handle_type_mismatch_v1(BadAddress* where, uintptr_t) {
    static char message[200];
    std::snprintf(message, sizeof message, "misaligned address at %s:%u", where->file, where->line);
    emulation::fail(message);
}

// -- emulation.h --------------------------------------------------------------------------------------------------------

void __syncthreads() {
    emulation::current().alone = false;
    emulation::current().state = emulation::State::at_barrier;
    emulation::yield();
}
void __syncwarp(unsigned) {
    emulation::current().alone = false;
    emulation::collective([](void**) {}, nullptr);
}
unsigned __ballot_sync(unsigned, int predicate) {
    struct Ballot {
        int predicate;
        unsigned result;
    } mine{predicate, 0};
    emulation::collective(
        [](void** lanes) {
            unsigned votes = 0;
            const int count = emulation::machine.current->lanes;
            for (int i = 0; i < count; i++) votes |= unsigned(static_cast<Ballot*>(lanes[i])->predicate != 0) << i;
            for (int i = 0; i < count; i++) static_cast<Ballot*>(lanes[i])->result = votes;
        },
        &mine);
    return mine.result;
}

#include "hopper_runtime.h"
#include "twins_runtime.h"
