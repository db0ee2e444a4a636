// A linear layer of one token: out = weight x (+ bias) (+ residual), x normed first where FROM is float (gemv.cuh).
//
//   weight [rows, width] of TYPE, tiles by `half` (quant.cuh), x [width] of FROM, gain [width] float32 (FROM=float),
//   bias [rows] and residual [rows] float32 or null, out [rows] of OUT, on the device or in page-locked host memory
//   grid: blocks that share the tiles, block 256, dynamic shared memory as gemv.cuh says
#include "gemv.cuh"

extern "C" __global__ void __launch_bounds__(256, BLOCKS)
gemv(const byte* weight, const FROM* x, const float* gain, float eps, const float* bias, const float* residual, OUT* out,
     int rows, int width, int half) {
    product(Matrix{weight, rows, width, half}, x, gain, eps, [=](int row, float y, float) {
        if (threadIdx.x >= 16 || row >= rows) return;
        if (bias) y += bias[row];
        if (residual) y += residual[row];
        out[row] = from_float<OUT>(y);
    });
}
