// Query, key and value of one token from the normed residual stream (gemv.cuh, FROM=float): queries and keys rotated, the
// key and the value put where the cache has its next row.
//
//   weight [heads * Dh, width] of TYPE, tiles by half = Dh / 2: both of a rotated pair come out of one tile; its heads are
//   those from `first` on of H query heads, Hkv key heads, Hkv value heads. x [width], gain [width], bias [heads * Dh] or
//   null, cos and sin [Dh / 2] float32; q [H, Dh] of T, layer [2, Hkv, capacity, Dh] of T, start int32 [1]: the row
//   grid: blocks that share the tiles, block 256, dynamic shared memory as gemv.cuh says
//
// Angles and start lie in device memory, so that a captured graph finds new ones in each replay.
#include "gemv.cuh"

extern "C" __global__ void __launch_bounds__(256, BLOCKS)
gemv_heads(const byte* weight, const float* x, const float* gain, float eps, const float* bias, const float* cos,
           const float* sin, const int* start, T* q, T* layer, int rows, int width, int dh, int first, int heads, int kv_heads,
           int capacity) {
    product(Matrix{weight, rows, width, dh / 2}, x, gain, eps, [=](int row, float a, float b) {
        if (threadIdx.x >= 8) return;  // the others have row and partner the other way round
        if (bias) a += bias[row], b += bias[row + dh / 2];
        const int head = first + row / dh, i = row % dh;
        if (head < heads + kv_heads) {
            const float c = cos[i], s = sin[i], turned = a * c - b * s;
            b = b * c + a * s, a = turned;
        }
        T* to = head < heads ? q + head * dh : layer + ((head - heads) * (long long)capacity + start[0]) * dh;
        to[i] = from_float<T>(a), to[i + dh / 2] = from_float<T>(b);
    });
}
