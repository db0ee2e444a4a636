// New rows into a layer's cache: row t of k and v becomes row start[0] + t of every KV head.
//
//   k, v [T, Hkv, Dh] of T with `stride` from token to token (views of the joint product), layer [2, Hkv, capacity, Dh],
//   start int32 [1] in device memory, so that a captured graph appends where the cache has got to
//   grid (T), block 128: a block moves one row of all heads, 16 bytes a thread. It is also the transposition of prefill.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(128)
kv_append(const T* k, const T* v, T* layer, const int* start, int kv_heads, int dh, int stride, int capacity) {
    const int row = start[0] + blockIdx.x, chunks = dh / 8;
    for (int i = threadIdx.x; i < 2 * kv_heads * chunks; i += blockDim.x) {
        const int plane = i / chunks, at = 8 * (i % chunks);  // of keys 0 to Hkv - 1, then of values
        const T* from = (plane < kv_heads ? k + plane * dh : v + (plane - kv_heads) * dh) + blockIdx.x * (long long)stride;
        T* to = layer + (plane * (long long)capacity + row) * dh;
        *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
    }
}
