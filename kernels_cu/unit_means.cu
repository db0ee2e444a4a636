// The mean key of each run of `unit` rows: what blocks are scored by where reading every key would cost too much.
//
//   k [Hkv, N, Dh] of T, means [Hkv, U, Dh] of T, U = ceil(N / unit); strides in elements from head to head
//   grid (U, Hkv), block 64: a block sums one unit, a thread every 64th column. The last unit may be short.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(64)
unit_means(const T* k, T* means, int keys, int unit, int dh, int k_stride, int means_stride) {
    const int first = blockIdx.x * unit, last = min(first + unit, keys);
    k += blockIdx.y * (long long)k_stride;
    means += blockIdx.y * (long long)means_stride + blockIdx.x * dh;
    for (int i = threadIdx.x; i < dh; i += blockDim.x) {
        float sum = 0.0f;
        for (int row = first; row < last; row++) sum += to_float(k[(long long)row * dh + i]);
        means[i] = from_float<T>(sum / (last - first));
    }
}
