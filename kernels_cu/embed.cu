// Rows of a packed embedding: out[t] = weight[ids[t]], in float32, the residual stream's type.
//
//   weight [V, row bytes] of TYPE, ids [T] int32, out [T, D] float32
//   grid (T), block 128: one block a row, a thread unpacks every 128th unit of it.
#include "quant.cuh"

extern "C" __global__ void __launch_bounds__(128)
embed(const byte* weight, const int* ids, float* out, int width) {
    const byte* row = weight + (long long)ids[blockIdx.x] * (width / TYPE::VALUES * TYPE::SIZE);
    out += (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width / 32; i += blockDim.x) {
        const int block = i / TYPE::UNITS, u = i % TYPE::UNITS;
        const auto unit = TYPE::unit(row + block * TYPE::SIZE, u);
        float* values = out + block * TYPE::VALUES;
        for (int j = 0; j < 16; j++) {
            values[TYPE::first(u) + j] = unit.weight(j);
            values[TYPE::second(u) + j] = unit.weight(16 + j);
        }
    }
}
