// The linear layers of decode: out = x weight^T (+ bias) (+ residual) for few tokens, weights read once, packed as they are.
//
//   weight [rows, row bytes] of TYPE, x [tokens, width] of T, bias [rows] float32 or null,
//   residual [tokens, out_stride] float32 or null (it may be out), out [tokens, out_stride] of OUT
//   grid (ceil(rows / 16), ceil(tokens / 16)), block 256. Static shared memory: 8 KiB.
//
// Reading the weights is the work, and unpacking them must not become it. A warp takes 16 rows and goes through them in steps
// of four units of 32 weights; a lane unpacks one unit of two rows, to T, as prefill does. Tensor cores do the rest: operand
// a is four weights of each unit for the 16 rows, operand b the same columns of 8 tokens. Which columns a product
// brings together does not matter as long as both operands agree, so each lane keeps to its own unit and nothing is moved
// between lanes. The block's warps share the steps and join their sums at the end.
#include "quant.cuh"

constexpr int ROWS = 16, TOKENS = 16, WARPS = 8;

// The sums of a warp: rows lane / 4 and + 8 (early, late), tokens 2 (lane % 4) and + 1, of GROUPS times 8 tokens. x points at
// each group's token lane / 4.
template <int GROUPS>
__device__ __forceinline__ void multiply(float (&sums)[2][4], const byte* early, const byte* late, const T* const (&x)[2], int units) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 4 * warp; step < units; step += 4 * WARPS) {
        const bool there = step + lane % 4 < units;
        const int n = there ? step + lane % 4 : 0, block = n / TYPE::UNITS, u = n % TYPE::UNITS;
        const auto a = TYPE::unit(early + block * TYPE::SIZE, u), b = TYPE::unit(late + block * TYPE::SIZE, u);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {  // 8 columns each
            const unsigned four[4] = {a.pair<T>(8 * i), b.pair<T>(8 * i), a.pair<T>(8 * i + 2), b.pair<T>(8 * i + 2)};
            const unsigned next[4] = {a.pair<T>(8 * i + 4), b.pair<T>(8 * i + 4), a.pair<T>(8 * i + 6), b.pair<T>(8 * i + 6)};
            const int column = block * TYPE::VALUES + (i < 2 ? TYPE::first(u) : TYPE::second(u)) + 8 * (i % 2);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const uint4* columns = reinterpret_cast<const uint4*>(x[g] + column);
                const uint4 eight = there ? *columns : make_uint4(0, 0, 0, 0);
                mma_m16n8k16<T>(sums[g], four, eight.x, eight.y);
                mma_m16n8k16<T>(sums[g], next, eight.z, eight.w);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
gemv(const byte* weight, const T* x, const float* bias, const float* residual, OUT* out, int rows, int width, int out_stride,
     int tokens) {
    __shared__ float partial[WARPS][TOKENS][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    // Rows and tokens past the end: the last one again. Their sums are not stored.
    const long long row_bytes = width / TYPE::VALUES * TYPE::SIZE;
    const byte* early = weight + min(first_row + lane / 4, rows - 1) * row_bytes;
    const byte* late = weight + min(first_row + lane / 4 + 8, rows - 1) * row_bytes;
    const T* const of_token[2] = {x + min(first_token + lane / 4, tokens - 1) * (long long)width,
                                  x + min(first_token + lane / 4 + 8, tokens - 1) * (long long)width};
    float sums[2][4] = {};
    if (first_token + 8 < tokens) multiply<2>(sums, early, late, of_token, width / 32);
    else multiply<1>(sums, early, late, of_token, width / 32);

    for (int g = 0; g < 2; g++)
        for (int i = 0; i < 4; i++) partial[warp][8 * g + 2 * (lane % 4) + i % 2][lane / 4 + 8 * (i / 2)] = sums[g][i];
    __syncthreads();
    const int n = first_row + threadIdx.x % ROWS, m = first_token + threadIdx.x / ROWS;
    if (n < rows && m < tokens) {
        const long long at = (long long)m * out_stride + n;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += partial[w][threadIdx.x / ROWS][threadIdx.x % ROWS];
        if (bias) sum += bias[n];
        if (residual) sum += residual[at];
        out[at] = from_float<OUT>(sum);
    }
}
