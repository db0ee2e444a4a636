// What the attention kernels share: tiles in shared memory, and how their rows become operands of the tensor cores.
//
// A tile is rows of DH numbers (64, 96, 128 or 256), DH / 8 chunks of 16 bytes each; chunk c of row r lies at place
// c ^ (r & 7), so that the eight rows that ldmatrix reads at once, and the rows that cp.async writes, fall into different
// banks. Of rows of 96 every second begins half a line of banks further on: c ^ (r / 2 & 3) does the same.
//
// With WINDOWED `starts` says which key each query sees first (ascending; null: all). With CAPPED scores are capped softly:
// cap * tanh(score / cap). With PLACED, of attention_prefill and attention_wgmma, the query rows are not the last rows of the
// context, but lie anywhere in it: `spans` has tiles of at most 64 rows that follow each other there. Reach is null then, and
// neither of the others is given.
#ifndef SLIMRT_ATTENTION_CUH
#define SLIMRT_ATTENTION_CUH

#include "ptx.cuh"

constexpr int SINK = 64, RUN = 128;  // of slimrt.prune.reach
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float SCALE = DH == 64 ? 0.125f : DH == 96 ? 0.10206207261596577f : DH == 128 ? 0.08838834764831845f : 0.0625f;
constexpr float LOWEST = -3.0e38f;                // below any score: where nothing was seen yet
constexpr bool SQUARE = (DH & (DH - 1)) == 0;     // the swizzle of a row does not touch where it begins

__device__ __forceinline__ T* chunk_of(T* tile, int row, int chunk) {
    if constexpr (SQUARE) return tile + row * DH + (chunk ^ (row & 7)) * 8;
    else return tile + row * DH + (chunk ^ (row / 2 & 3)) * 8;
}

// The first row that query `row` reads besides the sink; 0 where it reads everything (slimrt.prune.reach.first_row).
__device__ __forceinline__ int first_row(const int* reach, int head, int row) {
    const int rows = reach ? reach[head] : 0, first = row / RUN * RUN - rows;
    return rows && first > SINK ? first : 0;
}

// Rows first .. first + ROWS of `from` into a tile, by THREADS threads; rows outside [0, limit) become zeros.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const T* from, long long stride, int first, int limit) {
    constexpr int CHUNKS = DH / 8, STEP = THREADS / CHUNKS;
    if constexpr (STEP * CHUNKS != THREADS || STEP % 8) {
#pragma unroll 2  // all at once would not fit into the registers of block_scores
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int row = first + i / CHUNKS, chunk = i % CHUNKS;
            cp_async16(chunk_of(tile, i / CHUNKS, chunk), from + row * stride + chunk * 8, unsigned(row) < unsigned(limit));
        }
        return;
    }
    // A multiple of 8 rows a step: all of a thread's have one swizzle.
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    tile = chunk_of(tile, row, chunk);
    from += (first + row) * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP)
        cp_async16(tile + i * DH, from + i * stride, unsigned(first + row + i) < unsigned(limit));
}

// Where a lane's row of 16 begins, for ldmatrix: at chunk 0 or 1 of row lane % 16 (operands a and values), or of the rows as
// keys want them. Chunk 2 k of the same row is that with the bits of 2 k turned, whatever the swizzle did.
__device__ __forceinline__ int row_start(int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (SQUARE) return lane % 16 * DH + (lane / 16 ^ lane % 8) * 8 ^ 16 * k;
    else return lane % 16 * DH + (lane / 16 ^ lane / 2 % 4 ^ 2 * k) * 8;
}
__device__ __forceinline__ int key_start(int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (SQUARE) return (lane / 16 * 8 + lane % 8) * DH + (lane / 8 % 2 ^ lane % 8) * 8 ^ 16 * k;
    else return (lane / 16 * 8 + lane % 8) * DH + (lane / 8 % 2 ^ lane / 2 % 4 ^ 2 * k) * 8;
}

// Operand a [16, 16]: rows row .. + 15 (a multiple of 16), columns 16 k .. + 15 of a tile.
__device__ __forceinline__ void rows_operand(unsigned (&a)[4], const T* tile, int row, int k) {
    ldmatrix_x4(a, tile + row * DH + row_start(k));
}

// The same from global memory, rows of `stride`: 16 from `row` on, zeros from row `limit` on.
__device__ __forceinline__ void rows_operand_global(unsigned (&a)[4], const T* const (&rows)[2], int k) {
    const int at = 16 * k + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const T* row = rows[i % 2];
        a[i] = row ? *reinterpret_cast<const unsigned*>(row + at + 8 * (i / 2)) : 0;
    }
}

// Operands b [16, 8] of two times 8 keys: b[0], b[1] for keys row .. + 7, b[2], b[3] for the next 8; columns 16 k .. + 15.
__device__ __forceinline__ void keys_operand(unsigned (&b)[4], const T* tile, int row, int k) {
    ldmatrix_x4(b, tile + row * DH + key_start(k));
}

// Operands b [16, 8] of 16 values (rows row .. + 15): b[0], b[1] for columns 16 d .. + 7, b[2], b[3] for the next 8.
__device__ __forceinline__ void values_operand(unsigned (&b)[4], const T* tile, int row, int d) {
    ldmatrix_x4_trans(b, tile + row * DH + row_start(d));
}

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

#ifdef WINDOWED
// The first key that query row `token` of `tokens` sees; of rows that do not exist, that of the nearest.
__device__ __forceinline__ int first_seen(const int* starts, int token, int tokens) {
    return starts ? starts[max(0, min(token, tokens - 1))] : 0;
}
#endif

#ifdef PLACED
#define PLACED_ARGUMENT , const int* spans

// `spans` [tiles + 1, 2]: each tile's first row in q, and the place of that row among the keys; ascending, and last the number
// of rows. A block takes `count` tiles, those with most keys start first; a tile that fills up the last block has no rows.
__device__ __forceinline__ const int* tiles_of_block(const int* spans, int count) {
    return spans + 2 * count * (int(gridDim.y) - 1 - int(blockIdx.y));
}

// The last key that any row of a block's tiles sees.
__device__ __forceinline__ int last_placed(const int* placed, int count) {
    int last = 0;
    for (int tile = 0; tile < count; tile++)
        last = max(last, placed[2 * tile + 1] + placed[2 * tile + 2] - placed[2 * tile] - 1);
    return last;
}
#else
#define PLACED_ARGUMENT
#endif

// Raw products `scores` become those of capped scores. tanh by the exponential: its error, some 2^-22, is that of cap, which
// no 16-bit operand shows.
template <int N>
__device__ __forceinline__ void soften(float (&scores)[N][4], float cap) {
#ifdef CAPPED
    const float in = 2.0f * LOG2_E * SCALE / cap, out = cap / SCALE;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] = out - 2.0f * out * reciprocal_fast(1.0f + exp2_fast(in * scores[n][i]));
#endif
}

// One step of the running softmax of a row pair (rows g and g + 8 of 16): `scores` [N][4] raw products become weights
// 2^(scaled - peak), `mixed` and `total` shrink to the new peak. The scale with log2(e) is folded into the exponent. Peaks
// soon stop moving: where none of the warp's did, the multiplications by one are left out.
template <int N>
__device__ __forceinline__ void softmax_step(float (&scores)[N][4], float (&mixed)[DH / 8][4], float (&peak)[2],
                                             float (&total)[2]) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float highest = -FLOAT_INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        const float higher = fmaxf(peak[half], quad_max(highest) * (SCALE * LOG2_E));
        shrink[half] = exp2_fast(peak[half] - higher);
        peak[half] = higher;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                scores[n][i] = exp2_fast(__fmaf_rn(scores[n][i], SCALE * LOG2_E, -higher));
                sum += scores[n][i];
            }
        total[half] = total[half] * shrink[half] + sum;
    }
    if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < DH / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) mixed[d][i] *= shrink[i / 2];
    }
}

// The weights of keys 16 k .. + 15 as operand a: an accumulator's layout is that of an operand.
template <int N>
__device__ __forceinline__ void weights_operand(unsigned (&a)[4], const float (&weights)[N][4], int k) {
    a[0] = pack<T>(weights[2 * k][0], weights[2 * k][1]);
    a[1] = pack<T>(weights[2 * k][2], weights[2 * k][3]);
    a[2] = pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]);
    a[3] = pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3]);
}

#endif
