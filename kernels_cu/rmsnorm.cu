// rmsnorm:     out = x / sqrt(mean(x^2) + eps) * gain
// add_rmsnorm: x += delta, then the same: the residual stream is read and written once for both
//
//   x [T, D] float32 (the residual stream), delta [T, D] of T, gain [D] float32, out [T, D] of T
//   grid (T), block 256: one block a row. D is a multiple of 4.
//
// The row is read twice, in vectors of 4; the second time it comes out of the cache.
#include "reduce.cuh"

template <bool ADD>
__device__ __forceinline__ void norm(float* x, const T* delta, const float* gain, T* out, int width, float eps) {
    __shared__ float scratch[32];
    const long long row = (long long)blockIdx.x * width;
    x += row;
    float square = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        float4 v = *reinterpret_cast<float4*>(x + i);
        if (ADD) {
            const T* d = delta + row + i;
            v.x += to_float(d[0]), v.y += to_float(d[1]), v.z += to_float(d[2]), v.w += to_float(d[3]);
            *reinterpret_cast<float4*>(x + i) = v;
        }
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float factor = rsqrtf(block_reduce<Sum>(square, scratch) / width + eps);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = *reinterpret_cast<float4*>(x + i);
        const float4 g = *reinterpret_cast<const float4*>(gain + i);
        *reinterpret_cast<uint2*>(out + row + i) =
            make_uint2(pack<T>(v.x * factor * g.x, v.y * factor * g.y), pack<T>(v.z * factor * g.z, v.w * factor * g.w));
    }
}

extern "C" __global__ void __launch_bounds__(256)
rmsnorm(const float* x, const float* gain, T* out, int width, float eps) {
    norm<false>(const_cast<float*>(x), nullptr, gain, out, width, eps);
}

extern "C" __global__ void __launch_bounds__(256)
add_rmsnorm(float* x, const T* delta, const float* gain, T* out, int width, float eps) {
    norm<true>(x, delta, gain, out, width, eps);
}
