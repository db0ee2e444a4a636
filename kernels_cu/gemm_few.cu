// Linear layers for few tokens: out = x weight^T (+ bias) (+ residual), weights read once for every 16 tokens, as they lie.
// For one token there is gemv.cu.
//
//   weight [rows, width] of TYPE, tiles by `half` (quant.cuh), x [tokens, width] of T, bias [rows] float32 or null,
//   residual [tokens, out_stride] float32 or null (it may be out), out [tokens, out_stride] of OUT
//   grid (ceil(rows / 16), ceil(tokens / 16)), block 256. Static shared memory: 8 KiB.
//
// A block takes a tile of 16 rows and goes through it in steps of four units of 32 weights; a lane unpacks one unit of two
// rows, to T, as prefill does. Tensor cores do the rest: operand a is four weights of each unit for the 16 rows, operand b
// the same columns of 8 tokens. Which columns a product brings together does not matter as long as both operands agree, so
// each lane keeps to its own unit and nothing is moved between lanes. The block's warps share the steps and join their
// sums at the end.
#include "quant.cuh"

constexpr int ROWS = 16, TOKENS = 16, WARPS = 8;

// The sums of a warp: rows lane / 4 and + 8 of the tile, tokens 2 (lane % 4) and + 1, of GROUPS times 8 tokens. x points at
// each group's token lane / 4.
template <int GROUPS>
__device__ __forceinline__ void multiply(float (&sums)[2][4], const Matrix& matrix, const T* const (&x)[2]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = matrix.width / 32;
    for (int step = 4 * warp; step < units; step += 4 * WARPS) {
        const bool there = step + lane % 4 < units;
        const int u = there ? step + lane % 4 : 0;
        const auto a = matrix.unit<TYPE>(blockIdx.x, lane / 4, u), b = matrix.unit<TYPE>(blockIdx.x, lane / 4 + 8, u);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
            const unsigned four[4] = {a.template pair<T>(i), b.template pair<T>(i), a.template pair<T>(i + 2),
                                      b.template pair<T>(i + 2)};
            const unsigned next[4] = {a.template pair<T>(i + 4), b.template pair<T>(i + 4), a.template pair<T>(i + 6),
                                      b.template pair<T>(i + 6)};
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const uint4* columns = reinterpret_cast<const uint4*>(x[g] + 32 * u + i);
                const uint4 eight = there ? *columns : make_uint4(0, 0, 0, 0);
                mma_m16n8k16<T>(sums[g], four, eight.x, eight.y);
                mma_m16n8k16<T>(sums[g], next, eight.z, eight.w);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
gemm_few(const byte* weight, const T* x, const float* bias, const float* residual, OUT* out, int rows, int width, int half,
         int out_stride, int tokens) {
    __shared__ float partial[WARPS][TOKENS][ROWS];
    const Matrix matrix = {weight, rows, width, half};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_token = blockIdx.y * TOKENS;
    // Tokens past the end: the last one again. Their sums are not stored.
    const T* const of_token[2] = {x + min(first_token + lane / 4, tokens - 1) * (long long)width,
                                  x + min(first_token + lane / 4 + 8, tokens - 1) * (long long)width};
    float sums[2][4] = {};
    if (first_token + 8 < tokens) multiply<2>(sums, matrix, of_token);
    else multiply<1>(sums, matrix, of_token);

    for (int g = 0; g < 2; g++)
        for (int i = 0; i < 4; i++) partial[warp][8 * g + 2 * (lane % 4) + i % 2][lane / 4 + 8 * (i / 2)] = sums[g][i];
    __syncthreads();
    const int n = matrix.row(blockIdx.x, threadIdx.x % ROWS), m = first_token + threadIdx.x / ROWS;
    if (n < rows && m < tokens) {
        const long long at = (long long)m * out_stride + n;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += partial[w][threadIdx.x / ROWS][threadIdx.x % ROWS];
        if (bias) sum += bias[n];
        if (residual) sum += residual[at];
        out[at] = from_float<OUT>(sum);
    }
}
