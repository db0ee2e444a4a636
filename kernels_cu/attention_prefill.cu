// Causal grouped-query attention of a prompt (FlashAttention-2, arXiv 2307.08691): query row t of T reads key rows
// 0 .. N - T + t of N, or the sink and a window of them where its KV head has a `reach` (slimrt.prune.reach).
//
//   q [T, H, DH] with q_stride from token to token; k, v [Hkv, N, DH] with kv_stride from head to head; out [T, H, DH]
//   reach [Hkv] int32 or null; starts [T] int32 or null, cap: see attention.cuh. T, DH, TILE (64 or 128 query rows),
//   STAGES (1 or 2), maybe WINDOWED (then reach is null) and CAPPED, or PLACED are macros.
//   grid (H, tiles), block 128, dynamic shared memory 2 * DH * (TILE + 128 * STAGES) bytes
//
// Four warps hold TILE / 4 query rows each and go through tiles of 64 keys; scores and weights never leave the registers.
// Query tiles are cut at multiples of TILE from the first row of the context on, not of this call, so that a tile lies in
// one run of `reach`. The tiles with most keys start first, the heads that share a KV head side by side (L2).
//
// Keys and values come by cp.async in turn, k0 v0 k1 v1 ..., one group each; all but the youngest group is waited for, so
// keys j + 1 are under way during the softmax of tile j, values j + 1 during the product with keys j + 1.
// STAGES 2: two buffers of each, the next load starts as soon as the tile is there: two barriers a tile. STAGES 1: one buffer
// of each, refilled when all have read it: four barriers, less memory. What fits twice on a multiprocessor (DH 128):
// 128 rows in 2 stages on sm_90, 128 in 1 on sm_80, 64 in 1 on sm_86 and sm_89.
#include "attention.cuh"

constexpr int KEYS = 64, THREADS = 128, PARTS = TILE / 64;  // a warp holds PARTS times 16 rows

extern "C" __global__ void __launch_bounds__(THREADS)
attention_prefill(const T* q, const T* k, const T* v, T* out, const int* reach, int tokens, int keys, int heads, int kv_heads,
                  int q_stride, int kv_stride, const int* starts, float cap PLACED_ARGUMENT) {
    DYNAMIC_SHARED(T, queries);
    T* const key_tiles = queries + TILE * DH;
    T* const value_tiles = key_tiles + STAGES * KEYS * DH;

    // By a shuffle the compiler knows that all lanes have the same: what follows from it stays in uniform registers.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0);
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
#ifdef PLACED
    const int* const placed = tiles_of_block(spans, PARTS);
    const int* const mine = placed + 2 * (warp * PARTS / 4);
    const int my_first = mine[1] + 16 * PARTS * (warp % (4 / PARTS)), offset = mine[1] - mine[0], end = mine[2];
    const int first_query = placed[1], last = last_placed(placed, PARTS);
#else
    const int offset = keys - tokens, first_query = ((keys - 1) / TILE - int(blockIdx.y)) * TILE, end = tokens;
    const int my_first = first_query + 16 * PARTS * warp, last = min(first_query + TILE, keys) - 1;
#endif
    const int my_last = my_first + 16 * PARTS - 1;

    const long long head_at = (long long)kv_head * kv_stride;
#ifdef WINDOWED
    const int lowest = first_seen(starts, first_query - offset, tokens) / KEYS * KEYS;
    const int tiles = (last - lowest) / KEYS + 1;
    auto first_key = [=](int tile) { return lowest + tile * KEYS; };
    const int my_lowest = first_seen(starts, my_first - offset, tokens);  // of this warp's rows, and the highest of them
    const int my_highest = first_seen(starts, my_last - offset, tokens);
    int starting[PARTS][2];
    for (int p = 0; p < PARTS; p++)
        for (int half = 0; half < 2; half++)
            starting[p][half] = first_seen(starts, my_first + 16 * p + lane / 4 + 8 * half - offset, tokens);
#else
    const int first = first_row(reach, kv_head, first_query);
    const int tiles = last / KEYS - first / KEYS + 1 + (first > 0);
    const int jump = first ? first - KEYS : 0;  // from the sink to the window
    auto first_key = [=](int tile) { return tile == 0 ? 0 : jump + tile * KEYS; };
#endif
    auto load_keys = [=](int tile) {
        if (tile < tiles)
            load_tile<KEYS, THREADS>(key_tiles + tile % STAGES * KEYS * DH, k + head_at, DH, first_key(tile), keys);
        cp_async_commit();
    };
    auto load_values = [=](int tile) {
        if (tile < tiles)
            load_tile<KEYS, THREADS>(value_tiles + tile % STAGES * KEYS * DH, v + head_at, DH, first_key(tile), keys);
        cp_async_commit();
    };

    float mixed[PARTS][DH / 8][4] = {}, peak[PARTS][2], total[PARTS][2] = {};
#ifdef WINDOWED
    for (int p = 0; p < PARTS; p++) peak[p][0] = peak[p][1] = LOWEST;  // a row may see nothing of the first tiles
#else
    for (int p = 0; p < PARTS; p++) peak[p][0] = peak[p][1] = -FLOAT_INFINITY;
#endif
#ifdef PLACED
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        load_tile<64, THREADS>(queries + part * 64 * DH, q + (long long)head * DH, q_stride, placed[2 * part],
                               placed[2 * part + 2]);
#else
    load_tile<TILE, THREADS>(queries, q + (long long)head * DH, q_stride, first_query - offset, tokens);
#endif
    load_keys(0);
    load_values(0);

    for (int tile = 0; tile < tiles; tile++) {
        const T* const key_tile = key_tiles + tile % STAGES * KEYS * DH;
        const T* const value_tile = value_tiles + tile % STAGES * KEYS * DH;
        const int key = first_key(tile);
#ifdef WINDOWED
        const bool seen = key <= my_last && key + KEYS > my_lowest;
#else
        const bool seen = key <= my_last;  // by any row of this warp
#endif

        cp_async_wait<1>();
        __syncthreads();
        if (STAGES == 2) load_keys(tile + 1);
        float scores[PARTS][KEYS / 8][4] = {};
        if (seen) {
#pragma unroll 2  // more at once, for DH 128, would not fit into the registers
            for (int c = 0; c < DH / 16; c++) {
                unsigned a[PARTS][4], b[4];
#pragma unroll
                for (int p = 0; p < PARTS; p++) rows_operand(a[p], queries, 16 * (PARTS * warp + p), c);
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    keys_operand(b, key_tile, 16 * n, c);
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        mma_m16n8k16<T>(scores[p][2 * n], a[p], b[0], b[1]);
                        mma_m16n8k16<T>(scores[p][2 * n + 1], a[p], b[2], b[3]);
                    }
                }
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            load_keys(tile + 1);
        }

        if (seen) {
#pragma unroll
            for (int p = 0; p < PARTS; p++) soften(scores[p], cap);
#ifdef WINDOWED
            if (key < my_highest) {
#pragma unroll
                for (int p = 0; p < PARTS; p++)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (key + 8 * n + 2 * (lane % 4) + i % 2 < starting[p][i / 2]) scores[p][n][i] = -FLOAT_INFINITY;
            }
#endif
            if (key + KEYS - 1 > my_first) {  // on the diagonal
                const int ahead = my_first + lane / 4 - key - 2 * (lane % 4);
#pragma unroll
                for (int p = 0; p < PARTS; p++)
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            if (8 * n + i % 2 > ahead + 16 * p + 8 * (i / 2))
                                scores[p][n][i] = -FLOAT_INFINITY;
            }
#pragma unroll
            for (int p = 0; p < PARTS; p++) softmax_step(scores[p], mixed[p], peak[p], total[p]);
        }

        cp_async_wait<1>();
        __syncthreads();
        if (STAGES == 2) load_values(tile + 1);
        if (seen) {
#pragma unroll
            for (int c = 0; c < KEYS / 16; c++) {
                unsigned a[PARTS][4], b[4];
#pragma unroll
                for (int p = 0; p < PARTS; p++) weights_operand(a[p], scores[p], c);
#pragma unroll
                for (int d = 0; d < DH / 16; d++) {
                    values_operand(b, value_tile, 16 * c, d);
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        mma_m16n8k16<T>(mixed[p][2 * d], a[p], b[0], b[1]);
                        mma_m16n8k16<T>(mixed[p][2 * d + 1], a[p], b[2], b[3]);
                    }
                }
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            load_values(tile + 1);
        }
    }

#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = 1.0f / quad_sum(total[p][half]);
            const int token = my_first + 16 * p + lane / 4 + 8 * half - offset;
            if (unsigned(token) >= unsigned(end)) continue;
            T* row = out + ((long long)token * heads + head) * DH + 2 * (lane % 4);
#pragma unroll
            for (int d = 0; d < DH / 8; d++)
                *reinterpret_cast<unsigned*>(row + 8 * d) =
                    pack<T>(mixed[p][d][2 * half] * factor, mixed[p][d][2 * half + 1] * factor);
        }
}
