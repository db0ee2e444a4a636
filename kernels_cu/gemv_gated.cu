// The first half of one token's feed-forward: out = silu(gate) * up, from the normed residual stream (gemv.cuh, FROM=float).
//
//   weight [2 F, width] of TYPE, gate first, tiles by half = F: a gate and its up come out of one tile; x [width] and
//   gain [width] float32, bias [2 F] float32 or null, out [F] of T
//   grid: blocks that share the tiles, block 256, dynamic shared memory as gemv.cuh says
#include "gemv.cuh"

extern "C" __global__ void __launch_bounds__(256, BLOCKS)
gemv_gated(const byte* weight, const float* x, const float* gain, float eps, const float* bias, T* out, int count, int width) {
    product(Matrix{weight, 2 * count, width, count}, x, gain, eps, [=](int row, float gate, float up) {
        if (threadIdx.x >= 8) return;  // the others have row and partner the other way round
        if (bias) gate += bias[row], up += bias[row + count];
        // exp(-gate) = infinity gives the limit, 0
        out[row] = from_float<T>(gate / (1.0f + exp2_fast(-1.4426950408889634f * gate)) * up);
    });
}
