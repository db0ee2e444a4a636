// CUDA's execution model on one CPU thread: included ahead of a kernel's unchanged source, it makes that source C++.
//
// Each CUDA thread is a fiber. A fiber runs until it has to wait for others: at __syncthreads for its block, at a shuffle,
// mma, ldmatrix or __syncwarp for its warp. The last lane to arrive at such a warp operation carries it out for all.
// Warps run one after another, each as far as it gets, in an order drawn anew from the seed after every barrier, and so do
// the lanes of a warp after every operation of theirs: the most lopsided interleaving that the barriers allow, so that a
// missing one shows.
//
// Arithmetic is CuPy's: float32 below the normal range is zero (-ftz=true), a product and a sum are rounded once (-fmad=true,
// where the processor can). Under AddressSanitizer a load or store at an address that its type does not allow is an error.
//
// What it does not show: lanes that overtake one another between two loads (each runs to its next operation; so a __syncwarp
// beside an operation of the warp, which keeps its lanes in step or its stores in order, is missed by nothing here), "memory"
// in an asm's list of what it changes, which products NVRTC chooses to join with a sum, the last bits of approximate functions (exp2_fast, __expf, rsqrtf, __fdividef), a store
// that another block sees late, and time.
//
// Shared memory holds NaN (all bits set) when a block starts. cp.async is *eager* (it copies at once: what it must not
// overwrite yet is lost) or *deferred* (it writes NaN, and copies when the thread waits for the group: what is read too
// early is NaN). What a lane has waited for ldmatrix may read behind a barrier only, for it reads it for other lanes.
//
// What does not depend on the kernel is only declared here and compiled once, in runtime.cpp and what it includes.
#pragma once

#include "machine.h"

// -- the language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("kernel_shared")))

struct alignas(8) float2 {
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
extern "C" float fmaxf(float, float), fminf(float, float), fabsf(float);
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __expf(float x) { return __builtin_expf(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned x) {
    float result;
    __builtin_memcpy(&result, &x, 4);
    return result;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned result;
    __builtin_memcpy(&result, &x, 4);
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

// -- built-in variables and functions -----------------------------------------------------------------------------------------

#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)

void __syncthreads();
void __syncwarp(unsigned = ~0u);

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
            for (int lane = 0; lane < machine.current->lanes; lane++) {
                auto& to = *static_cast<Shuffle<V>*>(lanes[lane]);
                if (to.source >= 0 && to.source < machine.current->lanes)
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
unsigned __ballot_sync(unsigned, int predicate);
inline int atomicAdd(int* to, int value) {  // threads give way to each other at barriers and warp operations only
    const int before = *to;
    *to += value;
    return before;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

#include "twins.h"
#include "hopper.h"
