// What of the emulation no source changes: compiled once, and linked with each.
#include "emulation.h"

#include <sys/mman.h>

#include <cstdio>

#if defined(__SSE__)
#include <immintrin.h>
#endif

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

Machine machine;

void yield() { switch_context(machine.current->context, machine.scheduler); }

void wait_until(bool (*condition)(Fiber&), void* subject, unsigned value) {
    Fiber& fiber = *machine.current;
    fiber.condition = condition, fiber.subject = subject, fiber.value = value;
    if (condition(fiber)) return;
    fiber.state = State::waiting;
    yield();
}

[[noreturn]] void fail(const char* message) {
    machine.error = message;
    for (;;) yield();
}

// Not instrumented: it never returns, so a red zone of its frame would stay behind on the stack.
__attribute__((no_sanitize("address"))) static void fiber_main() {
    machine.body.call(machine.body.kernel, machine.body.args);
    machine.current->state = State::done;
    for (;;) yield();
}

void collective(Operation operation, void* operands) {
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
                const unsigned start = random.below(WARP), step = 2 * random.below(WARP / 2) + 1;
                for (int i = 0; i < WARP; i++) {
                    const int lane = int((start + i * step) % WARP);
                    if (lane >= warp.lanes) continue;
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

// CuPy compiles with -ftz=true: float32 that are too small to be normal are zero, as operands and as results.
#if defined(__SSE__)
struct FlushToZero {
    const unsigned outside = _mm_getcsr();
    FlushToZero() { _mm_setcsr(outside | 0x8040); }
    ~FlushToZero() { _mm_setcsr(outside); }
};
#else
struct FlushToZero {};
#endif

const char* run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool deferred, unsigned seed, Body body) {
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
    [[maybe_unused]] const FlushToZero flush;
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

}  // namespace emulation

// What g++ calls ahead of a load or store at an address that its type does not allow (-fsanitize=alignment), in the place of
// its own library, which would only report it. A GPU ends the kernel there.
struct BadAddress {
    const char* file;
    unsigned line, column;
};
extern "C" HIDDEN void __ubsan_handle_type_mismatch_v1(BadAddress* where, uintptr_t) {
    static char message[200];
    std::snprintf(message, sizeof message, "misaligned address at %s:%u", where->file, where->line);
    emulation::fail(message);
}

// -- emulation.h --------------------------------------------------------------------------------------------------------

void __syncthreads() {
    emulation::machine.current->state = emulation::State::at_barrier;
    emulation::yield();
}
void __syncwarp(unsigned) {
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
            const int count = emulation::machine.current->warp->lanes;
            for (int i = 0; i < count; i++) votes |= unsigned(static_cast<Ballot*>(lanes[i])->predicate != 0) << i;
            for (int i = 0; i < count; i++) static_cast<Ballot*>(lanes[i])->result = votes;
        },
        &mine);
    return mine.result;
}


// -- twins.h ------------------------------------------------------------------------------------------------------------

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
static const Halves table;
const float* const halves = table.of.data();
}  // namespace emulation


namespace emulation {
static double half_of(unsigned pair, int i) { return to_float(f16{static_cast<unsigned short>(pair >> 16 * i)}); }
}  // namespace emulation
unsigned sub_f16x2(unsigned a, unsigned b) {
    using emulation::half_of;
    return pack<f16>(float(half_of(a, 0) - half_of(b, 0)), float(half_of(a, 1) - half_of(b, 1)));
}
unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    using emulation::half_of;
    auto of = [=](int i) { return float(half_of(a, i) * half_of(b, i) + half_of(c, i)); };
    return pack<f16>(of(0), of(1));
}


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

template void mma_m16n8k16<f16>(float (&)[4], const unsigned (&)[4], unsigned, unsigned);
template void mma_m16n8k16<bf16>(float (&)[4], const unsigned (&)[4], unsigned, unsigned);

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

void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<false>, &mine);
}
void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<true>, &mine);
}

namespace emulation {
static size_t chunk_of(const void* shared) { return size_t(static_cast<const char*>(shared) - machine.shared) / 16; }
static void land(const Copy& copy) {
    if (machine.deferred) {
        if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
        else std::memset(copy.shared, 0, 16);
    }
    if (chunk_of(copy.shared) < machine.unfenced.size()) machine.current->landed.push_back(chunk_of(copy.shared));
}
}  // namespace emulation

void cp_async16(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
        emulation::fail("cp.async: an address is not aligned to 16 bytes");
    if (emulation::machine.deferred) std::memset(shared, 0xff, 16);
    else if (valid) std::memcpy(shared, global, 16);
    else std::memset(shared, 0, 16);
    emulation::machine.current->groups.back().push_back({shared, global, valid});
    const size_t chunk = emulation::chunk_of(shared);  // beyond the end in static shared memory, which wgmma does not read
    if (chunk < emulation::machine.unfenced.size()) emulation::machine.unfenced[chunk] = true;
}
void cp_async_commit() { emulation::machine.current->groups.emplace_back(); }
void emulation::wait_for_copies(int pending) {
    auto& groups = machine.current->groups;
    while (int(groups.size()) - 1 > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

// -- hopper.h -----------------------------------------------------------------------------------------------------------

namespace emulation {
NamedBarrier& arrive_at(int id, int threads) {
    if (id < 1 || id > 15 || threads % WARP) fail("bar: id must be 1 to 15, threads whole warps");
    NamedBarrier& barrier = machine.named[id];
    if (barrier.arrived && barrier.threads != threads) fail("bar: threads disagree on how many there are");
    barrier.threads = threads;
    if (++barrier.arrived == threads) barrier.arrived = 0, barrier.generation++;
    return barrier;
}
struct Phases {  // an mbarrier
    unsigned short count, pending;
    unsigned phase;
};
}  // namespace emulation

void barrier_arrive(int id, int threads) { emulation::arrive_at(id, threads); }
void barrier_sync(int id, int threads) {
    const unsigned generation = emulation::machine.named[id & 15].generation;
    emulation::wait_until(
        [](emulation::Fiber& fiber) {
            return static_cast<emulation::NamedBarrier*>(fiber.subject)->generation != fiber.value;
        },
        &emulation::arrive_at(id, threads), generation);
}

void mbarrier_init(unsigned long long* barrier, int count) {
    *reinterpret_cast<emulation::Phases*>(barrier) = {(unsigned short)count, (unsigned short)count, 0};
}
void mbarrier_arrive(unsigned long long* barrier) {
    auto& phases = *reinterpret_cast<emulation::Phases*>(barrier);
    if (phases.count == 0xffff) emulation::fail("mbarrier: used before it was initialised");
    if (!--phases.pending) phases.pending = phases.count, phases.phase++;
}
bool mbarrier_try(unsigned long long* barrier, int parity) {
    const auto& phases = *reinterpret_cast<emulation::Phases*>(barrier);
    if (phases.count == 0xffff) emulation::fail("mbarrier: used before it was initialised");
    return int(phases.phase & 1) != parity;
}
void mbarrier_wait(unsigned long long* barrier, int parity) {
    emulation::wait_until(
        [](emulation::Fiber& fiber) {
            return mbarrier_try(static_cast<unsigned long long*>(fiber.subject), int(fiber.value));
        },
        barrier, unsigned(parity));
}

void fence_async_proxy() {
    for (size_t chunk : emulation::machine.current->landed) emulation::machine.unfenced[chunk] = false;
    emulation::machine.current->landed.clear();
}

namespace emulation {
unsigned short element(unsigned long long descriptor, int row, int k, bool columns) {
    auto field = [=](int bit) { return unsigned(descriptor >> bit & 0x3fff) << 4; };
    const unsigned start = field(0), leading = field(16), stride = field(32), mode = unsigned(descriptor >> 62);
    if (descriptor >> 49 & 7) fail("wgmma: a base offset is not emulated");
    const unsigned line = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;  // bytes
    unsigned at = start;
    if (!columns)
        at += row % 8 * line + row / 8 * stride + (mode ? k * 2 : k % 8 * 2 + k / 8 * leading);
    else
        at += row % (line / 2) * 2 + row / (line / 2) * (mode ? leading : stride) + k % 8 * line +
              k / 8 * (mode ? stride : leading);
    at ^= (at >> 7 & (line / 16 - 1)) << 4;
    at = (at & 0x3ffff) - SHARED_BASE;
    if (at + 2 > machine.shared_bytes) fail("wgmma reads outside the shared memory of its block");
    if (machine.unfenced[at / 16]) fail("wgmma reads what was written without fence.proxy.async");
    unsigned short bits;
    std::memcpy(&bits, machine.shared + at, 2);
    return bits;
}

}  // namespace emulation

void wgmma_fence() {
    emulation::collective([](void**) { emulation::machine.current->warp->products.fenced = true; }, nullptr);
}
void wgmma_commit() {
    emulation::collective(
        [](void**) {
            emulation::Products& products = emulation::machine.current->warp->products;
            products.groups.push_back(std::move(products.open));
            products.open.clear();
        },
        nullptr);
}
void emulation::wait_for_products(int pending) {
    collective(
        [](void** lanes) {
            Warp& warp = *machine.current->warp;
            const int pending = *static_cast<int*>(lanes[0]);
            for (int lane = 1; lane < warp.lanes; lane++)
                if (*static_cast<int*>(lanes[lane]) != pending) fail("wgmma: lanes of one warp wait for different groups");
            while (int(warp.products.groups.size()) > pending) {
                for (const Product& product : warp.products.groups.front()) product.multiply(warp, product);
                warp.products.groups.pop_front();
            }
            warp.products.fenced = false;
        },
        &pending);
}
