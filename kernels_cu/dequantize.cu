// Packed weights to T, for products with many rows: out = weights, rows after rows.
//
//   packed: `units` units of 32 weights of TYPE, out [units * 32] of T
//   grid (ceil(units / 128)), block 128: a thread unpacks a unit and stores its two runs, 32 bytes each.
//
// Rows are whole blocks, so a matrix is one long row, and a stacked matrix is one launch for each part.
#include "quant.cuh"

extern "C" __global__ void __launch_bounds__(128)
dequantize(const byte* packed, T* out, int units) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= units) return;
    const int block = i / TYPE::UNITS, u = i % TYPE::UNITS;
    const auto unit = TYPE::unit(packed + (long long)block * TYPE::SIZE, u);
    T* values = out + (long long)block * TYPE::VALUES;
    for (int j = 0; j < 32; j += 8) {
        const uint4 eight =
            make_uint4(pack<T>(unit.weight(j), unit.weight(j + 1)), pack<T>(unit.weight(j + 2), unit.weight(j + 3)),
                       pack<T>(unit.weight(j + 4), unit.weight(j + 5)), pack<T>(unit.weight(j + 6), unit.weight(j + 7)));
        *reinterpret_cast<uint4*>(values + (j < 16 ? TYPE::first(u) + j : TYPE::second(u) + j - 16)) = eight;
    }
}
