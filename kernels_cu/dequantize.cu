// Weights to T, for products with many rows.
//
//   weight [rows, width] of TYPE as quant.cuh has it, out [rows, width] of T
//   grid (ceil(rows / 16 * ceil(width / 128))), block 64: a thread unpacks a unit and stores it, 64 bytes; a block has
//   four units of each row of a tile.
#include "quant.cuh"

extern "C" __global__ void __launch_bounds__(64)
dequantize(const byte* weight, T* out, int rows, int width, int half) {
    const Matrix matrix = {weight, rows, width, half};
    const int across = (width + 127) / 128, tile = blockIdx.x / across;
    const int r = threadIdx.x / 4, u = blockIdx.x % across * 4 + threadIdx.x % 4, row = matrix.row(tile, r);
    if (row >= rows || u >= width / 32) return;
    const auto unit = matrix.unit<TYPE>(tile, r, u);
    T* values = out + row * (long long)width + 32 * u;
#pragma unroll
    for (int j = 0; j < 32; j += 8) {
        const uint4 eight =
            make_uint4(pack<T>(unit.weight(j), unit.weight(j + 1)), pack<T>(unit.weight(j + 2), unit.weight(j + 3)),
                       pack<T>(unit.weight(j + 4), unit.weight(j + 5)), pack<T>(unit.weight(j + 6), unit.weight(j + 7)));
        *reinterpret_cast<uint4*>(values + j) = eight;
    }
}
