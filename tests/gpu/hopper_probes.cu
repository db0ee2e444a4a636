// Each function of ptx_hopper.cuh alone: what attention_wgmma.cu takes for granted. T, COLUMNS and DEPTH
// (64 or 128 each) are macros.
#include "ptx_hopper.cuh"

constexpr int LINE = 64, N = COLUMNS, K = DEPTH;

__device__ __forceinline__ T* aligned(T* memory) { return memory + (-shared_address(memory) & 1023) / sizeof(T); }

// x [rows, width] into lines of 64 numbers, 16-byte chunks swizzled: panels of 64 columns, one after the other.
__device__ __forceinline__ T* place(T* tile, int row, int column, int rows) {
    return tile + column / LINE * rows * LINE + row * LINE + (column % LINE / 8 ^ row % 8) * 8 + column % 8;
}

__device__ __forceinline__ void store(const float (&d)[N / 8][4], float* out) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int n = 0; n < N / 8; n++)
        for (int i = 0; i < 4; i++) out[(16 * warp + lane / 4 + i / 2 * 8) * N + 8 * n + lane % 4 * 2 + i % 2] = d[n][i];
}

// out [64, N] = a [64, K] times b. way 0: both from shared memory, b is [N, K]. 1: the same, a from registers. 2: a from
// registers, b is [K, N]. Dynamic shared memory: 1024 + 2 * (64 * K + N * K) bytes.
extern "C" __global__ void __launch_bounds__(128) product(const T* a, const T* b, float* out, int way) {
    DYNAMIC_SHARED(T, memory);
    T* const tile_a = aligned(memory);
    T* const tile_b = tile_a + 64 * K;
    for (int i = threadIdx.x; i < 64 * K; i += 128) *place(tile_a, i / K, i % K, 64) = a[i];
    for (int i = threadIdx.x; i < N * K; i += 128)
        if (way < 2) *place(tile_b, i / K, i % K, N) = b[i];
        else *place(tile_b, i / N, i % N, K) = b[i];
    fence_async_proxy();
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned rows[K / 16][4];
#pragma unroll
    for (int c = 0; c < K / 16; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 16 * warp + lane / 4 + i % 2 * 8, column = 16 * c + lane % 4 * 2 + i / 2 * 8;
            rows[c][i] = *reinterpret_cast<const unsigned*>(a + row * K + column);
        }
    float d[N / 8][4];
    const unsigned long long from_a = tile_descriptor(tile_a, 0), keys = tile_descriptor(tile_b, 0);
    const unsigned long long values = tile_descriptor(tile_b, K * LINE * sizeof(T));
    if (way == 0) {
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < K / 16; c++)
            wgmma_tiles<T>(d, advanced(from_a, (c / 4 * 64 * LINE + c % 4 * 16) * int(sizeof(T))),
                           advanced(keys, (c / 4 * N * LINE + c % 4 * 16) * int(sizeof(T))), c > 0);
    } else if (way == 1) {
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < K / 16; c++)
            wgmma_rows<T>(d, rows[c], advanced(keys, (c / 4 * N * LINE + c % 4 * 16) * int(sizeof(T))), c > 0);
    } else {
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < K / 16; c++)
            wgmma_columns<T>(d, rows[c], advanced(values, c * 16 * LINE * int(sizeof(T))), c > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    settled(d);
    settled(rows);
    store(d, out);
}

// out [64, N] = the sum over `rounds` of a [rounds, 64, 64] times b [N, 64]: a warpgroup loads a by cp.async into two tiles in
// turn, the other multiplies. turns [2] counts how often either came to its turn at a named barrier. Dynamic shared memory:
// 1024 + 2 * (2 * 64 * 64 + 64 * N) bytes.
extern "C" __global__ void __launch_bounds__(256, 1)
relay(const T* a, const T* b, float* out, int* turns, int rounds) {
    DYNAMIC_SHARED(T, memory);
    __shared__ unsigned long long full[2], free[2];
    T* const tiles = aligned(memory);
    T* const tile_b = tiles + 2 * 64 * LINE;
    const int warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0), thread = threadIdx.x % 128;
    for (int i = threadIdx.x; i < N * LINE; i += 256) *place(tile_b, i / LINE, i % LINE, N) = b[i];
    fence_async_proxy();
    if (threadIdx.x < 2) {
        mbarrier_init(full + threadIdx.x, 128);
        mbarrier_init(free + threadIdx.x, 4);
    }
    __syncthreads();
    int mine = 0;
    if (warp < 4) {
        fewer_registers<24>();
        for (int round = 0; round < rounds; round++) {
            if (round >= 2) mbarrier_wait(free + round % 2, (round / 2 - 1) & 1);
            for (int i = thread; i < 64 * LINE / 8; i += 128)
                cp_async16(place(tiles + round % 2 * 64 * LINE, i / 8, i % 8 * 8, 64), a + (round * 512 + i) * 8, true);
            cp_async_commit();
            cp_async_wait<0>();
            fence_async_proxy();
            mbarrier_arrive(full + round % 2);
            barrier_sync(1, 256);
            mine++;
            barrier_arrive(2, 256);
        }
    } else {
        more_registers<240>();
        float d[N / 8][4] = {};
        const unsigned long long from_a = tile_descriptor(tiles, 0), keys = tile_descriptor(tile_b, 0);
        barrier_arrive(1, 256);
        for (int round = 0; round < rounds; round++) {
            mbarrier_wait(full + round % 2, round / 2 & 1);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < 4; c++)
                wgmma_tiles<T>(d, advanced(from_a, (round % 2 * 64 * LINE + c * 16) * int(sizeof(T))),
                               advanced(keys, c * 16 * int(sizeof(T))), true);
            wgmma_commit();
            wgmma_wait<0>();
            settled(d);
            if (threadIdx.x % 32 == 0) mbarrier_arrive(free + round % 2);
            barrier_sync(2, 256);
            mine++;
            if (round + 1 < rounds) barrier_arrive(1, 256);
        }
        store(d, out);
    }
    if (thread == 0) turns[warp / 4] = mine;
}
