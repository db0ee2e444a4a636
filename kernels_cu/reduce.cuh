// Sums and maxima over a warp and over a block.
#ifndef SLIMRT_REDUCE_CUH
#define SLIMRT_REDUCE_CUH

#include "ptx.cuh"

struct Sum {
    __device__ static float join(float a, float b) { return a + b; }
    __device__ static float nothing() { return 0.0f; }
};
struct Max {
    __device__ static float join(float a, float b) { return fmaxf(a, b); }
    __device__ static float nothing() { return -FLOAT_INFINITY; }
};

// The result is in every lane.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float x) {
    for (int mask = 16; mask; mask /= 2) x = Op::join(x, __shfl_xor_sync(FULL_WARP, x, mask));
    return x;
}

// The result is in every thread; `scratch` is shared memory for one float a warp, free again after the next barrier.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, float* scratch) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_reduce<Op>(x);
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_reduce<Op>(lane < warps ? scratch[lane] : Op::nothing());
}

#endif
