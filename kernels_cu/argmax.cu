// The greedy token of each row of logits: the first greatest, or -1 where any logit is NaN or infinite.
//
//   logits [rows, V] float32, token [rows] int32; grid (rows), block 1024. Static shared memory: 256 bytes.
//
// A pair (value, index) is reduced over the warp, then over the warps; of equal values the lower index wins.
#include "ptx.cuh"

struct Best {
    float value;
    int index;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
__device__ __forceinline__ Best warp_best(Best best) {
    for (int mask = 16; mask; mask /= 2)
        best = better(best, Best{__shfl_xor_sync(FULL_WARP, best.value, mask), __shfl_xor_sync(FULL_WARP, best.index, mask)});
    return best;
}

extern "C" __global__ void __launch_bounds__(1024)
argmax(const float* logits, int* token, int count) {
    __shared__ float values[32];
    __shared__ int indices[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    logits += blockIdx.x * (long long)count;
    // A logit that is not finite beats every other one, by an infinite value under the index -1.
    Best best = {-FLOAT_INFINITY, 0x7fffffff};
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float x = logits[i];
        best = better(best, x - x == 0.0f ? Best{x, i} : Best{FLOAT_INFINITY, -1});
    }
    best = warp_best(best);
    if (lane == 0) values[warp] = best.value, indices[warp] = best.index;
    __syncthreads();
    if (warp) return;
    best = warp_best(lane < blockDim.x / 32 ? Best{values[lane], indices[lane]} : Best{-FLOAT_INFINITY, 0x7fffffff});
    if (lane == 0) token[blockIdx.x] = best.index;
}
