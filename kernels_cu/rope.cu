// Rotary positions, in place: pairs (i, i + half) of each head turn by the row's angle i.
//
//   x [T, heads, Dh] of T with `stride` from token to token (query and key heads of the joint product at once),
//   cos, sin [T, half] float32
//   grid (T, ceil(heads * half / 256)), block 256: a thread turns one pair.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
rope(T* x, const float* cos, const float* sin, int heads, int dh, int half, int stride) {
    const int pair = blockIdx.y * blockDim.x + threadIdx.x;
    if (pair >= heads * half) return;
    const int i = pair % half;
    const long long angle = blockIdx.x * (long long)half + i;
    const float c = cos[angle], s = sin[angle];
    T* head = x + blockIdx.x * (long long)stride + pair / half * dh;
    const float a = to_float(head[i]), b = to_float(head[i + half]);
    head[i] = from_float<T>(a * c - b * s);
    head[i + half] = from_float<T>(b * c + a * s);
}
