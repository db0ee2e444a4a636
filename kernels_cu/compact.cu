// Pruning's gather: out = x[rows].
//
//   x [N, row_bytes], out [M, row_bytes] of any type, row_bytes a multiple of 16; rows [M] int32
//   grid (M), block 128: a block moves one row, 16 bytes a thread at a time.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(128)
compact(const unsigned char* x, unsigned char* out, const int* rows, int row_bytes) {
    const uint4* from = reinterpret_cast<const uint4*>(x + (long long)rows[blockIdx.x] * row_bytes);
    uint4* to = reinterpret_cast<uint4*>(out + (long long)blockIdx.x * row_bytes);
    for (int i = threadIdx.x; i < row_bytes / 16; i += blockDim.x) to[i] = from[i];
}
