// Each function of ptx.cuh by itself, for one warp: what the tests compare with the definition of the instruction, on the
// emulation and (make gpu) on the hardware. T is a macro.
#include "ptx.cuh"

extern "C" __global__ void mma(const unsigned* a, const unsigned* b, float* d) {
    const int lane = threadIdx.x;
    unsigned rows[4];
    float sums[4];
    for (int i = 0; i < 4; i++) rows[i] = a[4 * lane + i], sums[i] = d[4 * lane + i];
    mma_m16n8k16<T>(sums, rows, b[2 * lane], b[2 * lane + 1]);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

extern "C" __global__ void matrices(const uint4* rows, unsigned* straight, unsigned* transposed) {
    DYNAMIC_SHARED(uint4, tile);
    const int lane = threadIdx.x;
    tile[lane] = rows[lane];
    __syncthreads();
    unsigned r[4];
    ldmatrix_x4(r, tile + lane);
    for (int i = 0; i < 4; i++) straight[4 * lane + i] = r[i];
    ldmatrix_x4_trans(r, tile + lane);
    for (int i = 0; i < 4; i++) transposed[4 * lane + i] = r[i];
}

// Two groups of copies, each waited for by itself; every third copy is filled with zeros.
extern "C" __global__ void copies(const uint4* from, uint4* to) {
    DYNAMIC_SHARED(uint4, tile);
    const int lane = threadIdx.x;
    for (int group = 0; group < 2; group++) {
        cp_async16(tile + 32 * group + lane, from + 32 * group + lane, lane % 3 != 0);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    to[lane] = tile[31 - lane];
    cp_async_wait<0>();
    __syncthreads();
    to[32 + lane] = tile[32 + 31 - lane];
}

extern "C" __global__ void narrow(const float* in, T* single, unsigned* pairs, int count) {
    for (int i = threadIdx.x; i < count; i += 32) {
        single[i] = from_float<T>(in[i]);
        pairs[i] = pack<T>(in[i], in[count - 1 - i]);
    }
}

extern "C" __global__ void widen(const T* in, float* out, int count) {
    for (int i = threadIdx.x; i < count; i += 32) out[i] = to_float(in[i]);
}

extern "C" __global__ void exponential(const float* in, float* out, int count) {
    for (int i = threadIdx.x; i < count; i += 32) out[i] = exp2_fast(in[i]);
}
