// Which rows of the prompt go on: slimrt.prune.select.select_rows without a trip to the host.
//
//   scores [B] float32 of blocks of `block` rows, N rows in all; a block is wanted at least `follow` times as much as the
//   one before it; the first `sink` and last `local` blocks and the most wanted of the others, `count` blocks in all,
//   stay; ties go to the earlier block, NaN comes last. rows: the kept rows below N, ascending, int32
//   grid (1), block 1024, dynamic shared memory 4 * B
//
// A block stays if fewer than `count` blocks come before it in the order of scores: B comparisons a block, no sort (2048
// blocks: 4 M comparisons). Where it goes in the output is how many stay before it: a prefix sum over the block's threads.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(1024)
select_rows(const float* scores, int* rows, int blocks, int count, int block, int total_rows, int sink, int local,
            float follow) {
    DYNAMIC_SHARED(float, wanted);
    __shared__ int warp_kept[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
        const float score = b > 0 ? fmaxf(scores[b], follow * scores[b - 1]) : scores[b];  // the number of the two, if one
        wanted[b] = b < sink || b >= blocks - local ? FLOAT_INFINITY : score == score ? score : -FLOAT_INFINITY;
    }
    __syncthreads();
    int kept_before = 0;
    for (int base = 0; base < blocks; base += blockDim.x) {
        const int b = base + threadIdx.x;
        bool kept = false;
        if (b < blocks) {
            const float mine = wanted[b];
            int rank = 0;
            for (int other = 0; other < b; other++) rank += wanted[other] >= mine;
            for (int other = b + 1; other < blocks; other++) rank += wanted[other] > mine;
            kept = rank < count;
        }
        const unsigned votes = __ballot_sync(FULL_WARP, kept);
        if (lane == 0) warp_kept[warp] = __popc(votes);
        __syncthreads();
        int place = kept_before + __popc(votes & ((1u << lane) - 1));
        for (int w = 0; w < 32; w++) {
            place += w < warp ? warp_kept[w] : 0;
            kept_before += warp_kept[w];
        }
        if (kept)
            for (int row = b * block; row < min((b + 1) * block, total_rows); row++)
                rows[place * block + row - b * block] = row;
        __syncthreads();  // warp_kept is written again
    }
}
