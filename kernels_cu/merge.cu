// How a part's result joins the residual stream where that is more than a sum: x += scale * (y normed with gain, or y).
//
//   x, y [T, D] float32, gain [D] float32 or null; x in place
//   grid (T), block a multiple of 32, at most 256: one block a row. D is a multiple of 4.
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(256)
merge(float* x, const float* y, const float* gain, int width, float eps, float scale) {
    __shared__ float scratch[32];
    const long long row = (long long)blockIdx.x * width;
    x += row, y += row;
    float square = 0.0f, factor = scale;
    if (gain) {
        for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
            const float4 v = *reinterpret_cast<const float4*>(y + i);
            square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        factor *= rsqrtf(block_reduce<Sum>(square, scratch) / width + eps);
    }
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
        const float4 v = *reinterpret_cast<const float4*>(y + i), old = *reinterpret_cast<const float4*>(x + i);
        const float4 g = gain ? *reinterpret_cast<const float4*>(gain + i) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        *reinterpret_cast<float4*>(x + i) = make_float4(old.x + v.x * factor * g.x, old.y + v.y * factor * g.y,
                                                        old.z + v.z * factor * g.z, old.w + v.w * factor * g.w);
    }
}
