// How much the last W queries of a prompt want each block of keys: the four scores of slimrt.prune.scores.
//
// A softmax over all keys needs only, for each row (query and head) and each block, the block's greatest score m and the sum
// l of exp(score - m): one pass over the keys. From these come the row's greatest score M and sum L over all blocks, then
//     token_max    = max over rows of exp(m - M) / L
//     token_mass   = max over heads of the mean over queries of l exp(m - M) / L
//     unit_softmax = the same as token_mass, with the units' mean keys for keys
//     mean_qk      = the greatest mean over rows of |score| of the block's units
//
//   q [W, H, DH] with q_stride from query to query; keys [Hkv, N, DH] with keys_stride from head to head; `per_block` keys
//   make a block. causal: query w sees keys up to N - W + w. cap: with the macro CAPPED, see attention.cuh. Scores carry log2(e), so that 2^x serves for exp.
//   counted [1] or null: N in device memory, for a captured graph, in the place of the argument, which is then no less.
//   score_stats    grid (ceil(B / max(1, 64 / per_block)), Hkv), block 128 -> stats [H * W, B] of (m, l)
//   score_norms    grid (H * W), block 128                                -> norms [H * W] of (M, L)
//   score_softmax  grid (ceil(B / 128)), block 128                        -> scores [B]
//   score_products grid (ceil(U / 64), Hkv), block 128                    -> sums [Hkv, U] of |score| over a KV head's rows
//   score_mean     grid (ceil(B / 128)), block 128                        -> scores [B]
//   Dynamic shared memory of score_stats and score_products: 128 * DH + 16640 bytes: 64 keys, and for each of four warps
//   16 rows of their products with them.
#include "attention.cuh"
#include "reduce.cuh"

constexpr int KEYS = 64, ROWS = 16, PITCH = KEYS + 1;  // the pitch keeps 16 rows at one key in different banks

// Products of rows `first` .. + 15 of a KV head's W * group rows with a tile of 64 keys -> products [16, PITCH], unscaled.
// Row r is query r / group in head r % group of the KV head.
__device__ __forceinline__ void multiply(float* products, const T* tile, const T* q, int first, int rows, int group,
                                         int q_stride, float cap) {
    const int lane = threadIdx.x % 32;
    const T* row[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = first + lane / 4 + 8 * i;
        row[i] = r < rows ? q + (long long)(r / group) * q_stride + r % group * DH : nullptr;
    }
    __syncwarp();  // the lanes have read what lies in `products`, and are together again for the tensor cores
    float sums[KEYS / 8][4] = {};
#pragma unroll
    for (int c = 0; c < DH / 16; c++) {
        unsigned a[4], b[4];
        rows_operand_global(a, row, c);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            keys_operand(b, tile, 16 * n, c);
            mma_m16n8k16<T>(sums[2 * n], a, b[0], b[1]);
            mma_m16n8k16<T>(sums[2 * n + 1], a, b[2], b[3]);
        }
    }
    soften(sums, cap);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            products[(lane / 4 + 8 * (i / 2)) * PITCH + 8 * n + 2 * (lane % 4) + i % 2] = sums[n][i];
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(128)
score_stats(const T* q, const T* keys, float2* stats, int window, int count, int heads, int kv_heads, int q_stride,
            int keys_stride, int per_block, int causal, float cap, const int* counted) {
    DYNAMIC_SHARED(T, tile);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const products = reinterpret_cast<float*>(tile + KEYS * DH) + warp * ROWS * PITCH;
    const int kv_head = blockIdx.y, group = heads / kv_heads, rows = window * group;
    const int together = max(1, KEYS / per_block);
    const int first_block = blockIdx.x * together, first_key = first_block * per_block;
    const int last_key = min(counted ? counted[0] : count, first_key + together * per_block);
    q += kv_head * group * DH;
    for (int key = first_key; key < last_key; key += KEYS) {
        load_tile<KEYS, 128>(tile, keys + (long long)kv_head * keys_stride, DH, key, last_key);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        for (int first = ROWS * warp; first < rows; first += 4 * ROWS) {
            multiply(products, tile, q, first, rows, group, q_stride, cap);
            // Read again: no register has to hold them during the product.
            const int all = counted ? counted[0] : count, blocks = (all + per_block - 1) / per_block;
            // A lane takes whole pairs of a row and a block. Blocks of more keys than a tile are alone: they grow in place.
            for (int pair = lane; pair < ROWS * together; pair += 32) {
                const int r = first + pair % ROWS, b = first_block + pair / ROWS;
                if (r >= rows || b >= blocks) continue;
                const int query = r / group;
                const int last = min(min(last_key, (b + 1) * per_block), causal ? all - window + query + 1 : all);
                const float* row = products + pair % ROWS * PITCH - key;
                float2* stat = stats + ((long long)(kv_head * group + r % group) * window + query) * blocks + b;
                const int from = max(key, b * per_block), to = min(key + KEYS, last);
                const float2 before = key == first_key ? make_float2(-FLOAT_INFINITY, 0.0f) : *stat;
                float highest = before.x, sum = 0.0f;
                for (int i = from; i < to; i++) highest = fmaxf(highest, row[i] * (SCALE * LOG2_E));
                for (int i = from; i < to; i++) sum += exp2_fast(row[i] * (SCALE * LOG2_E) - highest);
                if (before.y > 0.0f) sum += before.y * exp2_fast(before.x - highest);
                *stat = make_float2(highest, sum);
            }
        }
        __syncthreads();  // the next tile goes to the same place
    }
}

extern "C" __global__ void __launch_bounds__(128)
score_norms(const float2* stats, float2* norms, int blocks, int per_block, const int* counted) {
    __shared__ float scratch[2][4];
    if (counted) blocks = (counted[0] + per_block - 1) / per_block;
    stats += (long long)blockIdx.x * blocks;
    float highest = -FLOAT_INFINITY, sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) highest = fmaxf(highest, stats[b].x);
    highest = block_reduce<Max>(highest, scratch[0]);
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += stats[b].y * exp2_fast(stats[b].x - highest);
    sum = block_reduce<Sum>(sum, scratch[1]);
    if (threadIdx.x == 0) norms[blockIdx.x] = make_float2(highest, sum);
}

extern "C" __global__ void __launch_bounds__(128)
score_softmax(const float2* stats, const float2* norms, float* scores, int window, int heads, int blocks, int mass,
              int per_block, const int* counted) {
    if (counted) blocks = (counted[0] + per_block - 1) / per_block;
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= blocks) return;
    float best = 0.0f;
    for (int head = 0; head < heads; head++) {
        float sum = 0.0f;
        for (int query = 0; query < window; query++) {
            const int row = head * window + query;
            const float2 stat = stats[(long long)row * blocks + b], norm = norms[row];
            const float strongest = exp2_fast(stat.x - norm.x) / norm.y;
            sum += strongest * stat.y;
            if (!mass) best = fmaxf(best, strongest);
        }
        if (mass) best = fmaxf(best, sum / window);
    }
    scores[b] = best;
}

extern "C" __global__ void __launch_bounds__(128)
score_products(const T* q, const T* means, float* sums, int window, int units, int heads, int kv_heads, int q_stride,
               int keys_stride) {
    DYNAMIC_SHARED(T, tile);
    __shared__ float partial[4][KEYS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const products = reinterpret_cast<float*>(tile + KEYS * DH) + warp * ROWS * PITCH;
    const int kv_head = blockIdx.y, group = heads / kv_heads, rows = window * group, key = blockIdx.x * KEYS;
    q += kv_head * group * DH;
    load_tile<KEYS, 128>(tile, means + (long long)kv_head * keys_stride, DH, key, units);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float total[2] = {};  // of keys lane and lane + 32
    for (int first = ROWS * warp; first < rows; first += 4 * ROWS) {
        multiply(products, tile, q, first, rows, group, q_stride, 1.0f);
        for (int r = 0; r < ROWS; r++)  // rows past the end are zeros
            for (int i = 0; i < 2; i++) total[i] += fabsf(products[r * PITCH + lane + 32 * i]) * SCALE;
    }
    for (int i = 0; i < 2; i++) partial[warp][lane + 32 * i] = total[i];
    __syncthreads();
    if (threadIdx.x < KEYS && key + threadIdx.x < units)
        sums[(long long)kv_head * units + key + threadIdx.x] =
            partial[0][threadIdx.x] + partial[1][threadIdx.x] + partial[2][threadIdx.x] + partial[3][threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128)
score_mean(const float* sums, float* scores, int units, int blocks, int kv_heads, int per_block, float scale) {
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= blocks) return;
    float best = 0.0f;
    for (int u = b * per_block; u < min(units, (b + 1) * per_block); u++) {
        float sum = 0.0f;
        for (int head = 0; head < kv_heads; head++) sum += sums[(long long)head * units + u];
        best = fmaxf(best, sum * scale);
    }
    scores[b] = best;
}
