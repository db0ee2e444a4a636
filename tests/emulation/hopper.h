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

void barrier_arrive(int id, int threads) HIDDEN;
void barrier_sync(int id, int threads) HIDDEN;
void mbarrier_init(unsigned long long* barrier, int count) HIDDEN;
void mbarrier_arrive(unsigned long long* barrier) HIDDEN;
bool mbarrier_try(unsigned long long* barrier, int parity) HIDDEN;
void mbarrier_wait(unsigned long long* barrier, int parity) HIDDEN;
void fence_async_proxy() HIDDEN;

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
unsigned short element(unsigned long long descriptor, int row, int k, bool columns) HIDDEN;

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

void wgmma_fence() HIDDEN;
void wgmma_commit() HIDDEN;
namespace emulation {
void wait_for_products(int pending) HIDDEN;
}
template <int PENDING>
void wgmma_wait() {
    emulation::wait_for_products(PENDING);
}
template <typename REGISTERS>
void settled(REGISTERS&) {}
