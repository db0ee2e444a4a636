// Attention of one new query over a cache, split over the keys (flash-decoding), in two launches.
//
//   q [H, DH]; k, v with kv_stride from head to head, rows of DH. Of length[0] rows (device memory, so that a captured graph
//   sees it grow) row i lies at row table[i / block] * block + i % block, or at row i where table is null. reach [Hkv] or
//   null: as in prefill, the query being row length[0] - 1. start [1] or null: with WINDOWED the first row that is
//   read, then reach is null. H / Hkv is at most 16. T, DH, maybe WINDOWED and CAPPED (cap: see attention.cuh) are macros.
//   attention_decode: grid (Hkv, splits), block 32 * WARPS, dynamic shared memory 128 * WARPS * DH bytes; WARPS is 4, of
//   heads wider than 128 2
//       -> partial [H, splits, DH + 2] float32: greatest score (times log2 e), sum of weights, weighted values
//   attention_combine: grid (H), block DH -> out [H, DH] of T
//
// The query heads of a KV head are the rows of one operand of the tensor cores, so each key and value is read once. A warp
// is a pipeline of its own: it takes every WARPS-th chunk of 16 rows of its block's share, two chunks in flight, and needs no
// barrier before the end, when the warps' results are joined through the shared memory that held their chunks.
#include "attention.cuh"

constexpr int WARPS = DH > 128 ? 2 : 4, ROWS = 16;
#ifdef WINDOWED
constexpr int FIRST_ROWS = 0;
#else
constexpr int FIRST_ROWS = SINK;  // that are read whatever is left out
#endif

// 16 rows of keys and of values into a warp's tiles, of the rows that are read those from `first` on.
struct Source {
    const T *k, *v;
    const int* table;
    int block, reads, skipped;  // rows left out after the sink

    __device__ __forceinline__ void load(T* keys, T* values, int first) const {
        constexpr int CHUNKS = DH / 8;
        for (int i = threadIdx.x % 32; i < ROWS * CHUNKS; i += 32) {
            const int read = first + i / CHUNKS, chunk = i % CHUNKS;
            const bool valid = read < reads;
            const int row = valid ? read + (read < FIRST_ROWS ? 0 : skipped) : 0;
            const long long at = (long long)(table ? table[row / block] * block + row % block : row) * DH + chunk * 8;
            cp_async16(chunk_of(keys, i / CHUNKS, chunk), k + at, valid);
            cp_async16(chunk_of(values, i / CHUNKS, chunk), v + at, valid);
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
attention_decode(const T* q, const T* k, const T* v, const int* table, const int* length, const int* reach, float* partial,
                 int heads, int kv_heads, int kv_stride, int block, const int* start, float cap) {
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ float peaks[WARPS][ROWS], totals[WARPS][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int kv_head = blockIdx.x, group = heads / kv_heads, splits = gridDim.y;

#ifdef WINDOWED
    const int first = start ? start[0] : 0;
#else
    const int first = first_row(reach, kv_head, length[0] - 1);
#endif
    const int skipped = first ? first - FIRST_ROWS : 0;
    const Source source = {k + (long long)kv_head * kv_stride, v + (long long)kv_head * kv_stride,
                           table, block, length[0] - skipped, skipped};
    const int chunks = (source.reads + ROWS - 1) / ROWS, share = (chunks + splits - 1) / splits;
    const int last_chunk = min(chunks, int(blockIdx.y + 1) * share);
    T* const tiles = reinterpret_cast<T*>(shared) + warp * 4 * ROWS * DH;  // keys and values, two stages
    auto load = [=](int chunk, int stage) {
        if (chunk < last_chunk) source.load(tiles + 2 * stage * ROWS * DH, tiles + (2 * stage + 1) * ROWS * DH, chunk * ROWS);
        cp_async_commit();
    };

    unsigned queries[DH / 16][4];
    const T* rows[2];
    for (int i = 0; i < 2; i++) rows[i] = lane / 4 + 8 * i < group ? q + (kv_head * group + lane / 4 + 8 * i) * DH : nullptr;
#pragma unroll
    for (int c = 0; c < DH / 16; c++) rows_operand_global(queries[c], rows, c);

    float mixed[DH / 8][4] = {}, peak[2] = {-FLOAT_INFINITY, -FLOAT_INFINITY}, total[2] = {};
    int stage = 0, chunk = blockIdx.y * share + warp;
    load(chunk, 0);
    for (; chunk < last_chunk; chunk += WARPS, stage ^= 1) {
        load(chunk + WARPS, stage ^ 1);
        cp_async_wait<1>();
        __syncwarp();
        const T *keys = tiles + 2 * stage * ROWS * DH, *values = keys + ROWS * DH;
        float scores[2][4] = {};
        unsigned a[4], b[4];
#pragma unroll
        for (int c = 0; c < DH / 16; c++) {
            keys_operand(b, keys, 0, c);
            mma_m16n8k16<T>(scores[0], queries[c], b[0], b[1]);
            mma_m16n8k16<T>(scores[1], queries[c], b[2], b[3]);
        }
        soften(scores, cap);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (chunk * ROWS + 8 * (i / 4) + 2 * (lane % 4) + i % 2 >= source.reads) scores[i / 4][i % 4] = -FLOAT_INFINITY;
        softmax_step(scores, mixed, peak, total);
        weights_operand(a, scores, 0);
#pragma unroll
        for (int d = 0; d < DH / 16; d++) {
            values_operand(b, values, 0, d);
            mma_m16n8k16<T>(mixed[2 * d], a, b[0], b[1]);
            mma_m16n8k16<T>(mixed[2 * d + 1], a, b[2], b[3]);
        }
        __syncwarp();  // the next load goes into this stage
    }

    __syncthreads();  // all warps have read their tiles: the memory is free for their results
    float* const results = reinterpret_cast<float*>(shared);  // [WARPS, ROWS, DH]
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + 8 * half;
        const float sum = quad_sum(total[half]);
        if (lane % 4 == 0) peaks[warp][row] = peak[half], totals[warp][row] = sum;
#pragma unroll
        for (int d = 0; d < DH / 8; d++)
            for (int i = 0; i < 2; i++) results[(warp * ROWS + row) * DH + 8 * d + 2 * (lane % 4) + i] = mixed[d][2 * half + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * DH; i += blockDim.x) {
        const int row = i / DH, d = i % DH;
        float highest = peaks[0][row], sum = 0.0f, value = 0.0f;
        for (int w = 1; w < WARPS; w++) highest = fmaxf(highest, peaks[w][row]);
        for (int w = 0; w < WARPS; w++) {
            if (peaks[w][row] == -FLOAT_INFINITY) continue;  // this warp had no chunk
            const float weight = exp2_fast(peaks[w][row] - highest);
            sum += weight * totals[w][row];
            value += weight * results[(w * ROWS + row) * DH + d];
        }
        float* out = partial + ((long long)(kv_head * group + row) * splits + blockIdx.y) * (DH + 2);
        if (d == 0) out[0] = highest, out[1] = sum;
        out[2 + d] = value;
    }
}

extern "C" __global__ void __launch_bounds__(DH)
attention_combine(const float* partial, T* out, int splits) {
    partial += (long long)blockIdx.x * splits * (DH + 2);
    float highest = -FLOAT_INFINITY, sum = 0.0f, value = 0.0f;
    for (int s = 0; s < splits; s++) highest = fmaxf(highest, partial[s * (DH + 2)]);
    for (int s = 0; s < splits; s++) {
        const float* part = partial + s * (DH + 2);
        const float weight = exp2_fast(part[0] - highest);  // 0 for a split that had nothing to read
        sum += weight * part[1];
        value += weight * part[2 + threadIdx.x];
    }
    out[blockIdx.x * DH + threadIdx.x] = from_float<T>(value / sum);
}
