// out = x / sqrt(mean(x^2) + eps) * gain
//
//   x [T, D] float32 (the residual stream), gain [D] float32, out [T, D] of T
//   grid (T), block a multiple of 32, at most 256: one block a row. D is a multiple of 4.
//
// The row is read twice, in vectors of 4; the second time it comes out of the cache.
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(256)
rmsnorm(const float* x, const float* gain, T* out, int width, float eps) {
    __shared__ float scratch[32];
    const long long row = (long long)blockIdx.x * width;
    x += row;
    float square = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = *reinterpret_cast<const float4*>(x + i);
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float factor = rsqrtf(block_reduce<Sum>(square, scratch) / width + eps);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = *reinterpret_cast<const float4*>(x + i);
        const float4 g = *reinterpret_cast<const float4*>(gain + i);
        *reinterpret_cast<uint2*>(out + row + i) =
            make_uint2(pack<T>(v.x * factor * g.x, v.y * factor * g.y), pack<T>(v.z * factor * g.z, v.w * factor * g.w));
    }
}
