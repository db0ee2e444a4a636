// The linear layers of decode: out = weight x (+ bias) (+ residual), weights read once, packed as they are.
//
//   weight [rows, row bytes] of TYPE, x [tokens, width] of T, bias [rows] float32 or null,
//   residual [tokens, out_stride] float32 or null (it may be out), out [tokens, out_stride] of OUT
//   grid (ceil(rows / 4), tokens), block 128. Static shared memory: 64 bytes.
//
// Reading the weights is the work. A block takes 4 rows and shares their units of 32 weights among its threads, so that all
// of a row is in flight at once; the rows share what was read of x. A unit's dot product is scale * sum(q x) + shift *
// sum(x): two operations a weight after unpacking, in float32, and sum(x) is common to the rows.
#include "quant.cuh"
#include "reduce.cuh"

constexpr int ROWS = 4;

// 16 values of x as float32.
__device__ __forceinline__ void load_run(float (&run)[16], const T* x) {
    for (int i = 0; i < 2; i++) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + 8 * i);
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
        for (int j = 0; j < 8; j++) run[8 * i + j] = to_float(T{static_cast<unsigned short>(words[j / 2] >> 16 * (j % 2))});
    }
}

extern "C" __global__ void __launch_bounds__(128)
gemv(const byte* weight, const T* x, const float* bias, const float* residual, OUT* out, int rows, int width, int out_stride) {
    __shared__ float partial[ROWS][4];
    const int first_row = blockIdx.x * ROWS;
    if (first_row >= rows) return;
    const long long row_bytes = (long long)(width / TYPE::VALUES) * TYPE::SIZE;
    const byte* row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = weight + min(first_row + r, rows - 1) * row_bytes;  // rows past the end: the last again
    x += (long long)blockIdx.y * width;

    float dot[ROWS] = {};
    for (int i = threadIdx.x; i < width / 32; i += blockDim.x) {
        const int block = i / TYPE::UNITS, u = i % TYPE::UNITS;
        float run[2][16], total[2] = {};
        load_run(run[0], x + block * TYPE::VALUES + TYPE::first(u));
        load_run(run[1], x + block * TYPE::VALUES + TYPE::second(u));
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 16; j++) total[half] += run[half][j];
        for (int r = 0; r < ROWS; r++) {
            const Unit unit = TYPE::unit<Raised>(row[r] + (long long)block * TYPE::SIZE, u);
            for (int half = 0; half < 2; half++) {
                float product = 0.0f;
                for (int j = 0; j < 16; j++) product = __fmaf_rn(unit.q[16 * half + j], run[half][j], product);
                if (TYPE::RAISES) product = Raised::lowered(product, total[half]);
                dot[r] = __fmaf_rn(unit.scale[half], product, dot[r]);
                dot[r] = __fmaf_rn(unit.shift[half], total[half], dot[r]);
            }
        }
    }

    for (int r = 0; r < ROWS; r++) {
        const float sum = warp_reduce<Sum>(dot[r]);
        if (threadIdx.x % 32 == 0) partial[r][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    const int n = first_row + threadIdx.x;
    if (threadIdx.x < ROWS && n < rows) {
        const long long at = (long long)blockIdx.y * out_stride + n;
        float sum = 0.0f;
        for (int warp = 0; warp < 4; warp++) sum += partial[threadIdx.x][warp];
        if (bias) sum += bias[n];
        if (residual) sum += residual[at];
        out[at] = from_float<OUT>(sum);
    }
}
