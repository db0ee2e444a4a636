// What sm_90a has beyond ptx.cuh: products of a warpgroup (wgmma), barriers in shared memory, named barriers, registers that
// move between warps. Like ptx.cuh this is all inline PTX, and the tests replace it (tests/emulation/hopper.h).
//
// A *warpgroup* is four consecutive warps, the first a multiple of four. Its 64 rows lie 16 a warp, in the fragment layout of
// mma.m16n8k16 (ptx.cuh): an accumulator [N / 8][4] is N / 8 fragments d side by side, an operand a of 16 columns is a[4].
//
// wgmma reads shared memory, accumulators and a[4] until a wait says otherwise: none of them may be touched before. What other
// instructions wrote to shared memory needs fence_async_proxy() by the thread that wrote it, then a barrier; what they wrote
// to registers needs wgmma_fence().
#ifndef SLIMRT_PTX_HOPPER_CUH
#define SLIMRT_PTX_HOPPER_CUH

#include "ptx.cuh"

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// -- registers and barriers -------------------------------------------------------------------------------------------------

// The registers of each thread of a warpgroup, from here on.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Barrier `id` (1 .. 15) of `threads` threads, whole warps: those that sync wait, those that arrive go on.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A barrier in shared memory: its phase ends when `count` threads have arrived, and the next begins. To wait for `parity` 0 is
// to wait for the end of the first phase, the third, ...; 1: of the second, the fourth, ... What was done before an arrival
// is seen after the wait. With WAIT_LIMIT a wait of so many clock cycles is given up: a hang becomes a wrong result.
__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ bool mbarrier_try(unsigned long long* barrier, int parity) {
    unsigned done;
    asm volatile("{\n\t"
                 ".reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t"
                 "}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(unsigned long long* barrier, int parity) {
#ifdef WAIT_LIMIT
    const unsigned begun = clock();
    while (!mbarrier_try(barrier, parity) && unsigned(clock()) - begun < unsigned(WAIT_LIMIT)) {
    }
#else
    while (!mbarrier_try(barrier, parity)) {
    }
#endif
}

// What this thread wrote to shared memory, or saw arrive by cp_async_wait, is there for wgmma after the next barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- products -----------------------------------------------------------------------------------------------------------

// A tile of 16-bit numbers in lines of 128 bytes: line r begins at 128 r, its 16-byte chunk c lies at place c ^ (r & 7); the
// tile begins at a multiple of 1024 bytes. The descriptor's `start` may be anywhere in line 0 of 8 (at multiples of 32 bytes).
//   K-major (keys): a line holds 64 consecutive k of one row; `leading` has no meaning.
//   MN-major (values): a line holds 64 consecutive columns of one k; the next 64 columns are `leading` bytes further on.
// Eight lines further are 1024 bytes.
__device__ __forceinline__ unsigned long long tile_descriptor(const void* start, int leading) {
    constexpr unsigned STRIDE = 1024, SWIZZLE_128 = 1;
    const unsigned low = (shared_address(start) & 0x3ffff) >> 4 | unsigned(leading) >> 4 << 16;
    return (unsigned long long)(STRIDE >> 4 | SWIZZLE_128 << 30) << 32 | low;
}
// The descriptor of the same tile `bytes` further on.
__device__ __forceinline__ unsigned long long advanced(unsigned long long descriptor, int bytes) {
    return descriptor + (unsigned(bytes) >> 4);
}

// d += a b^T, or without `add` d = a b^T: a [64, 16] and b [N, 16] K-major tiles.
template <typename HALF, int FRAGMENTS>
__device__ __forceinline__ void wgmma_tiles(float (&d)[FRAGMENTS][4], unsigned long long a, unsigned long long b, bool add);
// The same with a [64, 16] from registers.
template <typename HALF, int FRAGMENTS>
__device__ __forceinline__ void wgmma_rows(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b, bool add);
// d += a b: a [64, 16] from registers, b [16, N] an MN-major tile.
template <typename HALF, int FRAGMENTS>
__device__ __forceinline__ void wgmma_columns(float (&d)[FRAGMENTS][4], const unsigned (&a)[4], unsigned long long b,
                                              bool add);

#define SLIMRT_FRAGMENT(N) "+f"(d[N][0]), "+f"(d[N][1]), "+f"(d[N][2]), "+f"(d[N][3])
#define SLIMRT_FRAGMENTS_8(N)                                                                                           \
    SLIMRT_FRAGMENT(N), SLIMRT_FRAGMENT(N + 1), SLIMRT_FRAGMENT(N + 2), SLIMRT_FRAGMENT(N + 3), SLIMRT_FRAGMENT(N + 4), \
        SLIMRT_FRAGMENT(N + 5), SLIMRT_FRAGMENT(N + 6), SLIMRT_FRAGMENT(N + 7)
#define SLIMRT_OUT_8 SLIMRT_FRAGMENTS_8(0)
#define SLIMRT_OUT_16 SLIMRT_FRAGMENTS_8(0), SLIMRT_FRAGMENTS_8(8)
#define SLIMRT_NAMES_8                                                                                                  \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SLIMRT_NAMES_16                                                                                                 \
    SLIMRT_NAMES_8 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
                   "%58,%59,%60,%61,%62,%63"

// F fragments of an accumulator; N = 8 F columns; operands from P0 on come behind the accumulator's
#define SLIMRT_WGMMA(HALF, TYPE, F, N, P0, P1, P2, P3, P4, P5)                                                            \
    template <>                                                                                                         \
    __device__ __forceinline__ void wgmma_tiles<HALF, F>(float (&d)[F][4], unsigned long long a, unsigned long long b,   \
                                                         bool add) {                                                    \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P2 ", 0;\n\t"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SLIMRT_NAMES_##F "}, " P0 ", " P1 \
                     ", p, 1, 1, 0, 0;\n\t}"                                                                            \
                     : SLIMRT_OUT_##F                                                                                   \
                     : "l"(a), "l"(b), "r"(int(add)));                                                                  \
    }                                                                                                                   \
    template <>                                                                                                         \
    __device__ __forceinline__ void wgmma_rows<HALF, F>(float (&d)[F][4], const unsigned (&a)[4], unsigned long long b,  \
                                                        bool add) {                                                     \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P5 ", 0;\n\t"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SLIMRT_NAMES_##F "}, {" P0 "," P1 \
                     "," P2 "," P3 "}, " P4 ", p, 1, 1, 0;\n\t}"                                                        \
                     : SLIMRT_OUT_##F                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                              \
    }                                                                                                                   \
    template <>                                                                                                         \
    __device__ __forceinline__ void wgmma_columns<HALF, F>(float (&d)[F][4], const unsigned (&a)[4], unsigned long long b, \
                                                           bool add) {                                                  \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P5 ", 0;\n\t"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SLIMRT_NAMES_##F "}, {" P0 "," P1 \
                     "," P2 "," P3 "}, " P4 ", p, 1, 1, 1;\n\t}"                                                        \
                     : SLIMRT_OUT_##F                                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                              \
    }
SLIMRT_WGMMA(f16, "f16", 8, "64", "%32", "%33", "%34", "%35", "%36", "%37")
SLIMRT_WGMMA(bf16, "bf16", 8, "64", "%32", "%33", "%34", "%35", "%36", "%37")
SLIMRT_WGMMA(f16, "f16", 16, "128", "%64", "%65", "%66", "%67", "%68", "%69")
SLIMRT_WGMMA(bf16, "bf16", 16, "128", "%64", "%65", "%66", "%67", "%68", "%69")

// Before the first product, and before one whose registers other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the PENDING youngest are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// To the compiler these registers change here: no use of them moves up across the wait before it.
template <int COUNT>
__device__ __forceinline__ void settled(float (&d)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void settled(unsigned (&a)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

#endif
