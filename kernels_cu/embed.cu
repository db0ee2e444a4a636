// Rows of an embedding: out[t] = weight[ids[t]], in float32, the residual stream's type.
//
//   weight [V, D] of TYPE as quant.cuh has it, ids [T] int32, out [T, D] float32
//   embed: grid (T), block 128: one block a row, a thread unpacks every 128th unit of it.
//   begin: the first launch of a captured token. One block of 256 copies the `count` words that the host has written to
//   page-locked memory to where the kernels of the token read them, and embeds the first of them, the token itself.
#include "quant.cuh"

__device__ __forceinline__ void embed_row(const Matrix& weight, int id, float* out) {
    for (int u = threadIdx.x; u < weight.width / 32; u += blockDim.x) {
        const auto unit = weight.unit<TYPE>(weight.tile_of(id), weight.place_of(id), u);
#pragma unroll
        for (int j = 0; j < 32; j += 4)
            *reinterpret_cast<float4*>(out + 32 * u + j) =
                make_float4(unit.weight(j), unit.weight(j + 1), unit.weight(j + 2), unit.weight(j + 3));
    }
}

extern "C" __global__ void __launch_bounds__(128)
embed(const byte* weight, const int* ids, float* out, int rows, int width) {
    embed_row(Matrix{weight, rows, width, 8}, ids[blockIdx.x], out + (long long)blockIdx.x * width);
}

extern "C" __global__ void __launch_bounds__(256)
begin(const byte* weight, const int* host, int* device, float* out, int rows, int width, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) device[i] = host[i];
    embed_row(Matrix{weight, rows, width, 8}, host[0], out);
}
