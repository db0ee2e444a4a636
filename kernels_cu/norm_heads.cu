// Norms of queries and keys between projection and rotation, in place: x = x / sqrt(mean(x^2) + eps) * gain * scale.
//
//   x [T, groups, width] of T with `stride` from token to token (views of the joint product), gain [width] float32, or null:
//   then x is multiplied with `scale` and not normed. By head: groups heads of their width; the whole row: one group.
//   grid (T, groups), block a multiple of 32, at most 256: a block has one group, 4 numbers a thread. width is a multiple of 4.
#include "reduce.cuh"

__device__ __forceinline__ void four(float (&to)[4], const T* from) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    const unsigned words[2] = {v.x, v.y};
    for (int i = 0; i < 4; i++) to[i] = to_float(T{static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))});
}

extern "C" __global__ void __launch_bounds__(256)
norm_heads(T* x, const float* gain, float eps, float scale, int width, int stride) {
    __shared__ float scratch[32];
    x += blockIdx.x * (long long)stride + blockIdx.y * width;
    float v[4], square = 0.0f, factor = 1.0f;
    if (gain) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            four(v, x + i);
            square += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
        }
        factor = rsqrtf(block_reduce<Sum>(square, scratch) / width + eps);
    }
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        four(v, x + i);
        for (int k = 0; k < 4; k++) v[k] = v[k] * factor * (gain ? gain[i + k] : 1.0f) * scale;
        *reinterpret_cast<uint2*>(x + i) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    }
}
