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

void barrier_arrive(int id, int threads);
void barrier_sync(int id, int threads);
void mbarrier_init(unsigned long long* barrier, int count);
void mbarrier_arrive(unsigned long long* barrier);
bool mbarrier_try(unsigned long long* barrier, int parity);
void mbarrier_wait(unsigned long long* barrier, int parity);
void fence_async_proxy();

// -- products -----------------------------------------------------------------------------------------------------------

inline unsigned long long tile_descriptor(const void* start, int leading) {
    const unsigned long long address = (shared_address(start) & 0x3ffff) >> 4, step = unsigned(leading) >> 4;
    return address | step << 16 | 64ull << 32 | 1ull << 62;
}
inline unsigned long long advanced(unsigned long long descriptor, int bytes) {
    return descriptor + (unsigned(bytes) >> 4);
}

namespace emulation {
// Queue the products of one warp into d [fragments][4] of each lane: `a` are registers, or null, then `tile` describes them.
void issue(float* d, int fragments, bool brain, const unsigned* a, unsigned long long tile, unsigned long long b, bool add,
           bool columns);
template <typename HALF>
constexpr bool is_brain = false;
template <>
constexpr bool is_brain<bf16> = true;
}  // namespace emulation

template <typename HALF, int FRAGMENTS>
void wgmma_tiles(float (&d)[FRAGMENTS][4], unsigned long long a, unsigned long long b, bool add) {
    emulation::issue(d[0], FRAGMENTS, emulation::is_brain<HALF>, nullptr, a, b, add, false);
}
template <typename HALF, int FRAGMENTS>
void wgmma_rows(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    emulation::issue(d[0], FRAGMENTS, emulation::is_brain<HALF>, a, 0, b, add, false);
}
template <typename HALF, int FRAGMENTS>
void wgmma_columns(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    emulation::issue(d[0], FRAGMENTS, emulation::is_brain<HALF>, a, 0, b, add, true);
}

void wgmma_fence();
void wgmma_commit();
namespace emulation {
void wait_for_products(int pending);
}
template <int PENDING>
void wgmma_wait() {
    emulation::wait_for_products(PENDING);
}
template <typename REGISTERS>
void settled(REGISTERS&) {}
