// attention_prefill for Hopper (sm_90a): the same contract, by the products of warpgroups (FlashAttention-3, arXiv 2407.08608).
//
//   q [T, H, DH] with q_stride from token to token; k, v [Hkv, N, DH] with kv_stride from head to head; out [T, H, DH]
//   reach [Hkv] int32 or null; starts [T] int32 or null, cap: see attention.cuh. T, DH (64 or 128), STAGES (1 to 3), maybe
//   WINDOWED (then reach is null) and CAPPED, or PLACED are macros.
//   grid (H, tiles of 128 rows), block 384, dynamic shared memory 2 * DH * (128 + 256 * STAGES) + 1152 bytes
//
// The first warpgroup loads, by cp.async, two warps keys and two warps values, each through STAGES tiles of 128 keys with a
// pair of barriers each. The other two hold 64 query rows each. They go through the tiles from the diagonal back to the first:
// the product with keys j + 1 and the one of weights and values j are queued together, and the softmax of tile j + 1 runs
// beside the second. With PING_PONG they queue in turn, so that the softmax of one runs beside the products of the other.
//
// Tiles of queries and keys: lines of 64 numbers (128 bytes) as tile_descriptor has them; heads of 128 have two such panels.
#include "attention.cuh"
#include "ptx_hopper.cuh"

#ifndef PING_PONG
#define PING_PONG 1
#endif

constexpr int ROWS = 128, KEYS = 128, THREADS = 384, MEMBERS = 2;  // members: warpgroups that compute
constexpr int LINE = 64, PANELS = DH / LINE, LOADERS = 64;          // LOADERS: threads that fill one tile

// Rows 0 .. COUNT of `from`, DH apart, into a tile of PANEL lines a panel, by threads of which this is number `thread`, STEP
// lines a round. Rows from `limit` on become zeros.
template <int COUNT, int STEP, int PANEL, bool WHOLE>
__device__ __forceinline__ void load_lines(T* tile, const T* from, long long stride, int thread, int low, int limit) {
    const int row = thread / 8, chunk = thread % 8;
    tile += row * LINE + (chunk ^ (row & 7)) * 8;
    from += row * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP)
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            cp_async16(tile + panel * PANEL * LINE + i * LINE, from + i * stride + panel * LINE,
                       WHOLE || (row + i >= low && row + i < limit));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_wgmma(const T* q, const T* k, const T* v, T* out, const int* reach, int tokens, int keys, int heads, int kv_heads,
                int q_stride, int kv_stride, const int* starts, float cap PLACED_ARGUMENT) {
    DYNAMIC_SHARED(T, memory);
    T* const queries = memory + (-shared_address(memory) & 1023) / sizeof(T);
    T* const key_tiles = queries + ROWS * DH;
    T* const value_tiles = key_tiles + STAGES * KEYS * DH;
    unsigned long long* const barriers = reinterpret_cast<unsigned long long*>(value_tiles + STAGES * KEYS * DH);
    unsigned long long *const keys_full = barriers, *const keys_free = barriers + STAGES;
    unsigned long long *const values_full = barriers + 2 * STAGES, *const values_free = barriers + 3 * STAGES;

    const int lane = threadIdx.x % 32, warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0);
    const int head = blockIdx.x, kv_head = head / (heads / kv_heads);
#ifdef PLACED
    const int* const placed = tiles_of_block(spans, MEMBERS);
    const int first_query = placed[1], last = last_placed(placed, MEMBERS);
#else
    const int offset = keys - tokens, first_query = ((keys - 1) / ROWS - int(blockIdx.y)) * ROWS;  // the heaviest first
    const int last = min(first_query + ROWS, keys) - 1;
#endif
#ifdef WINDOWED
    const int lowest = first_seen(starts, first_query - offset, tokens), tiles = (last - lowest) / KEYS + 1;
    auto first_key = [=](int step) { return lowest + (tiles - 1 - step) * KEYS; };
#else
    const int first = first_row(reach, kv_head, first_query);
    const int tiles = (last - first) / KEYS + 1 + (first > 0);
    // Step n of all goes to tile tiles - 1 - n; tile 0 holds the sink where there is a window.
    auto first_key = [=](int step) {
        const int tile = tiles - 1 - step;
        return first ? (tile ? first + (tile - 1) * KEYS : 0) : tile * KEYS;
    };
#endif

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            mbarrier_init(keys_full + stage, LOADERS);
            mbarrier_init(values_full + stage, LOADERS);
            mbarrier_init(keys_free + stage, 4 * MEMBERS);
            mbarrier_init(values_free + stage, 4 * MEMBERS);
        }
    }
    __syncthreads();

    if (warp < 4) {
        fewer_registers<24>();
        const bool values = warp >= 2;
        const T* const from = (values ? v : k) + (long long)kv_head * kv_stride;
        T* const to = values ? value_tiles : key_tiles;
        unsigned long long *const full = values ? values_full : keys_full, *const free = values ? values_free : keys_free;
        const int thread = threadIdx.x % LOADERS;
        auto load = [=](int step) {
            const int key = first_key(step);
            T* const tile = to + step % STAGES * KEYS * DH;
            const T* const rows = from + (long long)key * DH;
            if (key + KEYS <= keys) load_lines<KEYS, LOADERS / 8, KEYS, true>(tile, rows, DH, thread, 0, KEYS);
            else load_lines<KEYS, LOADERS / 8, KEYS, false>(tile, rows, DH, thread, 0, keys - key);
        };
        auto landed = [=](int step) {
            fence_async_proxy();
            if (step < tiles) mbarrier_arrive(full + step % STAGES);
        };
#pragma unroll
        for (int step = 0; step < STAGES; step++) {
            if (step < tiles) load(step);
            cp_async_commit();
        }
        if (STAGES > 2) cp_async_wait<2>(), landed(STAGES - 3);
        if (STAGES > 1) cp_async_wait<1>(), landed(STAGES - 2);
        cp_async_wait<0>();
        landed(STAGES - 1);
        for (int step = STAGES; step < tiles; step++) {
            mbarrier_wait(free + step % STAGES, (step / STAGES - 1) & 1);
            load(step);
            cp_async_commit();
            cp_async_wait<0>();
            landed(step);
        }
    } else {
        more_registers<240>();
        const int member = warp / 4 - 1, thread = threadIdx.x % 128;
        T* const my_queries = queries + member * 64 * LINE;
#ifdef PLACED
        const int my_token = placed[2 * member], my_first = placed[2 * member + 1], offset = my_first - my_token;
        const int tokens = placed[2 * member + 2];  // up to the next tile
#else
        const int my_first = first_query + 64 * member, my_token = my_first - offset;
#endif
        const int my_row = my_first + 16 * (warp % 4) + lane / 4;
#ifdef WINDOWED
        const int starting[2] = {first_seen(starts, my_row - offset, tokens), first_seen(starts, my_row + 8 - offset, tokens)};
        const int highest_start = first_seen(starts, my_token + 63, tokens);
#endif
        load_lines<64, 16, ROWS, false>(my_queries, q + (long long)head * DH + (long long)my_token * q_stride, q_stride,
                                        thread, -my_token, tokens - my_token);
        cp_async_commit();
        cp_async_wait<0>();
        fence_async_proxy();
        barrier_sync(3 + member, 128);
        if (PING_PONG && member == 1) barrier_arrive(1, 256);  // the first turn is member 0's

        const unsigned long long query_descriptor = tile_descriptor(my_queries, 0);
        const unsigned long long key_descriptor = tile_descriptor(key_tiles, 0);
        const unsigned long long value_descriptor = tile_descriptor(value_tiles, KEYS * LINE * sizeof(T));

        float scores[KEYS / 8][4], mixed[DH / 8][4] = {}, peak[2] = {LOWEST, LOWEST}, total[2] = {}, shrink[2];
        unsigned weights[KEYS / 16][4];

        auto queue_scores = [&](int step) {
            const unsigned long long tile = advanced(key_descriptor, step % STAGES * KEYS * DH * int(sizeof(T)));
#pragma unroll
            for (int c = 0; c < DH / 16; c++) {
                const unsigned long long b = advanced(tile, (c / 4 * KEYS * LINE + c % 4 * 16) * int(sizeof(T)));
                const int at = (c / 4 * ROWS * LINE + c % 4 * 16) * int(sizeof(T));
                wgmma_tiles<T>(scores, advanced(query_descriptor, at), b, c > 0);
            }
            wgmma_commit();
        };
        auto queue_mixed = [&](int step) {
            const unsigned long long tile = advanced(value_descriptor, step % STAGES * KEYS * DH * int(sizeof(T)));
#pragma unroll
            for (int c = 0; c < KEYS / 16; c++)
                wgmma_columns<T>(mixed, weights[c], advanced(tile, c * 16 * LINE * int(sizeof(T))), true);
            wgmma_commit();
        };
        auto release = [=](unsigned long long* free, int step) {
            if (lane == 0) mbarrier_arrive(free + step % STAGES);
        };
        auto await_turn = [=]() {
            if (PING_PONG) barrier_sync(1 + member, 256);
        };
        auto pass_turn = [=](int step) {
            if (PING_PONG && (member == 0 || step + 1 < tiles)) barrier_arrive(2 - member, 256);
        };
        // Scores become weights relative to a new peak, by which `shrink` says what older sums have to be multiplied with.
        auto softmax = [&](int step, bool masked) {
            soften(scores, cap);
            if (masked) {
                const int key = first_key(step);
#ifdef WINDOWED
                const bool sink = false;
                const int before[2] = {starting[0] - key - 2 * (lane % 4), starting[1] - key - 2 * (lane % 4)};
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (8 * n + i % 2 < before[i / 2]) scores[n][i] = -FLOAT_INFINITY;
#else
                const bool sink = first && step == tiles - 1;
#endif
                const int ahead = (sink ? SINK - 1 : my_row - key) - 2 * (lane % 4), second = sink ? 0 : 8;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (8 * n + i % 2 > ahead + (i / 2) * second) scores[n][i] = -FLOAT_INFINITY;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = -FLOAT_INFINITY;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
                const float higher = fmaxf(peak[half], quad_max(highest) * (SCALE * LOG2_E));
                shrink[half] = exp2_fast(peak[half] - higher);
                peak[half] = higher;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        scores[n][i] = exp2_fast(__fmaf_rn(scores[n][i], SCALE * LOG2_E, -higher));
                        sum += scores[n][i];
                    }
                total[half] = total[half] * shrink[half] + sum;
            }
        };
        auto pack_weights = [&]() {
#pragma unroll
            for (int c = 0; c < KEYS / 16; c++) weights_operand(weights[c], scores, c);
        };
        auto advance = [&](int step, bool masked) {  // scores of this step, the sum of values of the one before
            const int before = step - 1;
            mbarrier_wait(keys_full + step % STAGES, step / STAGES & 1);
            await_turn();
            wgmma_fence();
            queue_scores(step);
            mbarrier_wait(values_full + before % STAGES, before / STAGES & 1);
            wgmma_fence();
            queue_mixed(before);
            pass_turn(step);
            wgmma_wait<1>();
            settled(scores);
            release(keys_free, step);
            softmax(step, masked);
            wgmma_wait<0>();
            settled(mixed);
            settled(weights);
            release(values_free, before);
#pragma unroll
            for (int d = 0; d < DH / 8; d++)
#pragma unroll
                for (int i = 0; i < 4; i++) mixed[d][i] *= shrink[i / 2];
            pack_weights();
        };

        mbarrier_wait(keys_full, 0);
        await_turn();
        wgmma_fence();
        queue_scores(0);
        pass_turn(0);
        wgmma_wait<0>();
        settled(scores);
        release(keys_free, 0);
        softmax(0, true);
        pack_weights();

        int step = 1;
#ifdef WINDOWED
        const int whole = tiles - max(0, highest_start - lowest + KEYS - 1) / KEYS;  // steps that all rows see from the first key
#else
        const int whole = tiles - (first > 0);  // steps before the sink's
#endif
        for (; step < whole && first_key(step) + KEYS - 1 > my_first; step++) advance(step, true);
#pragma unroll 1
        for (; step < whole; step++) advance(step, false);
        for (; step < tiles; step++) advance(step, true);

        const int final = tiles - 1;
        mbarrier_wait(values_full + final % STAGES, final / STAGES & 1);
        wgmma_fence();
        queue_mixed(final);
        wgmma_wait<0>();
        settled(mixed);
        settled(weights);

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float factor = 1.0f / quad_sum(total[half]);
            const int token = my_row + 8 * half - offset;
            if (unsigned(token) >= unsigned(tokens)) continue;
            T* row = out + ((long long)token * heads + head) * DH + 2 * (lane % 4);
#pragma unroll
            for (int d = 0; d < DH / 8; d++)
                *reinterpret_cast<unsigned*>(row + 8 * d) =
                    pack<T>(mixed[d][2 * half] * factor, mixed[d][2 * half + 1] * factor);
        }
    }
}
