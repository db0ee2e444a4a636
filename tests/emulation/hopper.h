// CPU twins of kernels_cu/ptx_hopper.cuh; its include guard is defined here, so that it stays out.
//
// A wgmma is carried out warp by warp, 16 of its 64 rows each. *Deferred* (the mode of cp.async too): its accumulators turn
// NaN when it is issued, and it reads its operands and writes its sums when the warp waits for its group; *eager*: at once.
// What it reads of shared memory it finds as the hardware does, by the fields of the descriptor. It is an error to issue one
// without wgmma_fence() since the last wait, and to read what cp.async brought and no fence_async_proxy() covers.
#pragma once

#include "twins.h"

#define SLIMRT_PTX_HOPPER_CUH

namespace emulation {
constexpr unsigned SHARED_BASE = 1024 + 48;  // where dynamic shared memory begins: aligned to no more than 16 bytes
}

inline unsigned shared_address(const void* shared) {
    return unsigned(static_cast<const char*>(shared) - emulation::machine.shared) + emulation::SHARED_BASE;
}

template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}

// -- barriers -----------------------------------------------------------------------------------------------------------

namespace emulation {
inline NamedBarrier& arrive_at(int id, int threads) {
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

inline void barrier_arrive(int id, int threads) { emulation::arrive_at(id, threads); }
inline void barrier_sync(int id, int threads) {
    const unsigned generation = emulation::machine.named[id & 15].generation;
    emulation::wait_until(
        [](emulation::Fiber& fiber) {
            return static_cast<emulation::NamedBarrier*>(fiber.subject)->generation != fiber.value;
        },
        &emulation::arrive_at(id, threads), generation);
}

inline void mbarrier_init(unsigned long long* barrier, int count) {
    *reinterpret_cast<emulation::Phases*>(barrier) = {(unsigned short)count, (unsigned short)count, 0};
}
inline void mbarrier_arrive(unsigned long long* barrier) {
    auto& phases = *reinterpret_cast<emulation::Phases*>(barrier);
    if (phases.count == 0xffff) emulation::fail("mbarrier: used before it was initialised");
    if (!--phases.pending) phases.pending = phases.count, phases.phase++;
}
inline bool mbarrier_try(unsigned long long* barrier, int parity) {
    const auto& phases = *reinterpret_cast<emulation::Phases*>(barrier);
    if (phases.count == 0xffff) emulation::fail("mbarrier: used before it was initialised");
    return int(phases.phase & 1) != parity;
}
inline void mbarrier_wait(unsigned long long* barrier, int parity) {
    emulation::wait_until(
        [](emulation::Fiber& fiber) {
            return mbarrier_try(static_cast<unsigned long long*>(fiber.subject), int(fiber.value));
        },
        barrier, unsigned(parity));
}

inline void fence_async_proxy() {
    for (size_t chunk : emulation::machine.current->landed) emulation::machine.unfenced[chunk] = false;
    emulation::machine.current->landed.clear();
}

// -- products -----------------------------------------------------------------------------------------------------------

inline unsigned long long tile_descriptor(const void* start, int leading) {
    const unsigned long long address = (shared_address(start) & 0x3ffff) >> 4, step = unsigned(leading) >> 4;
    return address | step << 16 | 64ull << 32 | 1ull << 62;
}
inline unsigned long long advanced(unsigned long long descriptor, int bytes) {
    return descriptor + (unsigned(bytes) >> 4);
}

namespace emulation {

// Number (row, k) of a tile, or (k, column) where `columns` says that it is MN-major; PTX ISA, "Shared Memory Matrix Layout".
inline unsigned short element(unsigned long long descriptor, int row, int k, bool columns) {
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

template <typename HALF, int FRAGMENTS>
void multiply(Warp& warp, const Product& product) {
    constexpr int WIDTH = 8 * FRAGMENTS;
    Accumulator& accumulator = warp.products.accumulators.at(product.accumulator);
    const int first = warp.first / WARP % 4 * 16;
    float a[16][16], b[16][WIDTH];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            if (product.rows[0]) {
                const unsigned pair = product.rows[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                a[row][k] = to_float(HALF{static_cast<unsigned short>(pair >> k % 2 * 16)});
            } else {
                a[row][k] = to_float(HALF{element(product.a, first + row, k, false)});
            }
    for (int n = 0; n < WIDTH; n++)
        for (int k = 0; k < 16; k++) b[k][n] = to_float(HALF{element(product.b, n, k, product.columns)});
    float* sums = accumulator.sums.data();
    if (!product.add) std::fill_n(sums, 16 * WIDTH, 0.0f);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < WIDTH; n++) sums[row * WIDTH + n] += a[row][k] * b[k][n];
    if (--accumulator.products) return;
    for (int lane = 0; lane < WARP; lane++)
        for (int i = 0; i < WIDTH / 2; i++)
            accumulator.of[lane][i] = sums[(lane / 4 + i / 2 % 2 * 8) * WIDTH + i / 4 * 8 + lane % 4 * 2 + i % 2];
    warp.products.accumulators.erase(product.accumulator);
}

template <typename HALF, int FRAGMENTS>
__attribute__((noinline)) void issue(float (&d)[FRAGMENTS][4], const unsigned* a, unsigned long long descriptor, unsigned long long b, bool add,
           bool columns) {
    struct Operands {
        float* d;
        Product product;
    } mine{&d[0][0], {multiply<HALF, FRAGMENTS>, nullptr, {a}, descriptor, b, add, columns}};
    collective(
        [](void** lanes) {
            constexpr int WIDTH = 8 * FRAGMENTS;
            Warp& warp = *machine.current->warp;
            if (warp.lanes != WARP) fail("wgmma: a warp is not whole");
            if (!warp.products.fenced) fail("wgmma: no wgmma.fence since registers may have changed");
            Product product = static_cast<Operands*>(lanes[0])->product;
            product.accumulator = static_cast<Operands*>(lanes[0])->d;
            Accumulator& accumulator = warp.products.accumulators[product.accumulator];
            if (!accumulator.products) accumulator.sums.resize(16 * WIDTH);
            for (int lane = 0; lane < WARP; lane++) {
                const Operands& from = *static_cast<Operands*>(lanes[lane]);
                product.rows[lane] = from.product.rows[0];
                if (accumulator.products) continue;
                accumulator.of[lane] = from.d;
                for (int i = 0; i < WIDTH / 2; i++) {
                    accumulator.sums[(lane / 4 + i / 2 % 2 * 8) * WIDTH + i / 4 * 8 + lane % 4 * 2 + i % 2] = from.d[i];
                    if (machine.deferred) from.d[i] = NAN;
                }
            }
            accumulator.products++;
            if (machine.deferred) warp.products.open.push_back(product);
            else product.multiply(warp, product);
        },
        &mine);
}
}  // namespace emulation

template <typename HALF, int FRAGMENTS>
void wgmma_tiles(float (&d)[FRAGMENTS][4], unsigned long long a, unsigned long long b, bool add) {
    emulation::issue<HALF>(d, nullptr, a, b, add, false);
}
template <typename HALF, int FRAGMENTS>
void wgmma_rows(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    emulation::issue<HALF>(d, a, 0, b, add, false);
}
template <typename HALF, int FRAGMENTS>
void wgmma_columns(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    emulation::issue<HALF>(d, a, 0, b, add, true);
}

inline void wgmma_fence() {
    emulation::collective([](void**) { emulation::machine.current->warp->products.fenced = true; }, nullptr);
}
inline void wgmma_commit() {
    emulation::collective(
        [](void**) {
            emulation::Products& products = emulation::machine.current->warp->products;
            products.groups.push_back(std::move(products.open));
            products.open.clear();
        },
        nullptr);
}
template <int PENDING>
void wgmma_wait() {
    emulation::collective(
        [](void**) {
            emulation::Warp& warp = *emulation::machine.current->warp;
            while (int(warp.products.groups.size()) > PENDING) {
                for (const emulation::Product& product : warp.products.groups.front()) product.multiply(warp, product);
                warp.products.groups.pop_front();
            }
            warp.products.fenced = false;
        },
        nullptr);
}
template <typename REGISTERS>
void settled(REGISTERS&) {}
