// What hopper.h declares: a part of runtime.cpp.
#pragma once

#include "state.h"

namespace emulation {
NamedBarrier& arrive_at(int id, int threads) {
    if (id < 1 || id > 15 || threads % WARP) fail("bar: id must be 1 to 15, threads whole warps");
    NamedBarrier& barrier = inner.named[id];
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
    const unsigned generation = emulation::inner.named[id & 15].generation;
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
    const unsigned place = unsigned(reinterpret_cast<char*>(barrier) - emulation::machine.shared) / 8 + phases.phase;
    if (!--phases.pending) phases.pending = phases.count, phases.phase++;
    // At some of them whoever waits goes on before the thread does: what it should have done before it came is too late. At
    // others it is the first, and gets ahead.
    if ((place + emulation::inner.mood) * 2654435761u >> 31)
        emulation::wait_until([](emulation::Fiber& fiber) { return emulation::inner.round - fiber.value >= 2; }, nullptr,
                              emulation::inner.round);
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
    for (size_t chunk : emulation::current().landed) emulation::inner.unfenced[chunk] = false;
    emulation::current().landed.clear();
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
    if (at + 2 > inner.shared_bytes) fail("wgmma reads outside the shared memory of its block");
    if (inner.unfenced[at / 16]) fail("wgmma reads what was written without fence.proxy.async");
    unsigned short bits;
    std::memcpy(&bits, machine.shared + at, 2);
    return bits;
}

// The number of 16 bits; `brain`: of a bfloat16.
static float number(unsigned short bits, bool brain) { return brain ? to_float(bf16{bits}) : to_float(f16{bits}); }

// Where sum (row, column) of a warp's [16, N] is: in which lane, and which of its registers.
static float& held(const Accumulator& accumulator, int row, int column) {
    return accumulator.of[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
}

static void multiply(Warp& warp, const Product& product) {
    const int width = product.width;
    size_t number_of = 0;
    while (warp.products.accumulators[number_of].key != product.accumulator) number_of++;
    Accumulator& accumulator = warp.products.accumulators[number_of];
    const int first = warp.first / WARP % 4 * 16;
    float a[16][16], b[16][256];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            if (product.rows[0]) {
                const unsigned pair = product.rows[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                a[row][k] = number(static_cast<unsigned short>(pair >> k % 2 * 16), product.brain);
            } else {
                a[row][k] = number(element(product.a, first + row, k, false), product.brain);
            }
    for (int n = 0; n < width; n++)
        for (int k = 0; k < 16; k++) b[k][n] = number(element(product.b, n, k, product.columns), product.brain);
    float* sums = accumulator.sums.data();
    if (!product.add) accumulator.sums.assign(size_t(16 * width), 0.0f);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < width; n++) sums[row * width + n] += a[row][k] * b[k][n];
    if (--accumulator.products) return;
    for (int row = 0; row < 16; row++)
        for (int n = 0; n < width; n++) held(accumulator, row, n) = sums[row * width + n];
    warp.products.accumulators.erase(warp.products.accumulators.begin() + long(number_of));
}

struct Operands {
    Product product;
};
static void issue_all(void** lanes) {
    Warp& warp = *current().warp;
    if (warp.lanes != WARP) fail("wgmma: a warp is not whole");
    if (!warp.products.fenced) fail("wgmma: no wgmma.fence since registers may have changed");
    Product product = static_cast<Operands*>(lanes[0])->product;
    Accumulator* accumulator = nullptr;
    for (Accumulator& other : warp.products.accumulators)
        if (other.key == product.accumulator) accumulator = &other;
    if (!accumulator) {
        accumulator = &warp.products.accumulators.emplace_back();
        accumulator->key = product.accumulator;
        accumulator->sums.resize(size_t(16 * product.width));
        for (int lane = 0; lane < WARP; lane++)
            accumulator->of[lane] = static_cast<Operands*>(lanes[lane])->product.accumulator;
        for (int row = 0; row < 16; row++)
            for (int n = 0; n < product.width; n++) {
                accumulator->sums[row * product.width + n] = held(*accumulator, row, n);
                if (inner.deferred) held(*accumulator, row, n) = NAN;
            }
    }
    for (int lane = 0; lane < WARP; lane++) product.rows[lane] = static_cast<Operands*>(lanes[lane])->product.rows[0];
    accumulator->products++;
    if (inner.deferred) warp.products.open.push_back(product);
    else multiply(warp, product);
}
void issue(float* d, int fragments, bool brain, const unsigned* a, unsigned long long tile, unsigned long long b, bool add,
           bool columns) {
    Operands mine{{8 * fragments, brain, d, {a}, tile, b, add, columns}};
    collective(issue_all, &mine);
}
}  // namespace emulation

void wgmma_fence() {
    emulation::collective([](void**) { emulation::current().warp->products.fenced = true; }, nullptr);
}
void wgmma_commit() {
    emulation::collective(
        [](void**) {
            emulation::Products& products = emulation::current().warp->products;
            products.groups.push_back(std::move(products.open));
            products.open.clear();
        },
        nullptr);
}
void emulation::wait_for_products(int pending) {
    collective(
        [](void** lanes) {
            Warp& warp = *current().warp;
            const int pending = *static_cast<int*>(lanes[0]);
            for (int lane = 1; lane < warp.lanes; lane++)
                if (*static_cast<int*>(lanes[lane]) != pending) fail("wgmma: lanes of one warp wait for different groups");
            while (int(warp.products.groups.size()) > pending) {
                for (const Product& product : warp.products.groups.front()) multiply(warp, product);
                warp.products.groups.erase(warp.products.groups.begin());
            }
            warp.products.fenced = false;
        },
        &pending);
}
