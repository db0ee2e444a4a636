// Which blocks of a layer the next token reads under a budget, decided where their scores are: slimrt.kv.choice, and the slots
// that slimrt.kv.layer_rows gives them, so that a captured token waits for no host.
//
//   step [6] int32, what the host knows of the token (enum Step)
//   scores [tail] float32: how much the query wants each block; overwritten
//   wishes [blocks] float32: of `EARLIER` blocks what was wanted before, which counts `DECAY` times as much; then what is now
//   slots [count + 1] int32: the block in each resident slot, the one that is being filled in the last
//   homes [blocks] addresses of the blocks in mapped host memory
//   -> from [count] addresses, to [count] int32: the first moved[0] are what has to be brought, and where to; moved[1] and [2]
//      count choices that moved something and blocks that moved
//   grid (1), block 256, dynamic shared memory: 4 * count + blocks bytes
//
// The blocks of the sink, the local ones and the best others are kept, `count` in all; of equal ones the earlier. What is
// kept already stays in its slot; the others take the free slots, both in ascending order. Nothing moves where `COMMON` of
// the blocks that are wanted lie there, unless the choice is forced: a block has become full, and the last slot is another's.
#include "reduce.cuh"

enum Step { CHOOSES, FORCED, TAIL, EARLIER, DECAY, COMMON };  // DECAY: the bits of a float32
constexpr int THREADS = 256;

// Bits whose order as numbers is that of the floats.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

struct Sums {
    int before, total;
};

// Of each thread's `own` the sum over the threads before it, and over all. All threads call it; scratch: one a warp.
__device__ __forceinline__ Sums sums_of(int own, int* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = own;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(FULL_WARP, sum, delta);
        if (lane >= delta) sum += other;
    }
    __syncthreads();  // what a call before this one left has been read
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    int earlier = 0, total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) earlier += scratch[w];
        total += scratch[w];
    }
    return {earlier + sum - own, total};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
choose_blocks(const int* step, float* scores, float* wishes, int* slots, const unsigned long long* homes,
              unsigned long long* from, int* to, int* moved, int count, int sink, int local) {
    DYNAMIC_SHARED(int, shared);
    __shared__ int scratch[THREADS / 32], bins[THREADS], found[2];
    int* const free = shared;                                              // [count]: slots
    unsigned char* const kept = reinterpret_cast<unsigned char*>(shared + count);  // [tail]
    const int thread = threadIdx.x, tail = step[TAIL];
    if (thread == 0) moved[0] = 0;
    if (!step[CHOOSES]) return;

    // Each thread has a run of blocks of its own, so that ties go to the earlier ones.
    const int run = (tail + THREADS - 1) / THREADS, first = min(tail, thread * run), last = min(tail, first + run);
    for (int b = first; b < last; b++) {
        float score = scores[b];
        if (b < step[EARLIER]) score = fmaxf(score, wishes[b] * __int_as_float(step[DECAY]));
        wishes[b] = score;
        scores[b] = b < sink || b >= tail - local ? FLOAT_INFINITY : score;
    }

    // The count-th largest score, eight bits at a time: `wanted` is how many of the numbers that begin with `prefix` are kept.
    unsigned prefix = 0;
    int wanted = count;
    for (int shift = 24; shift >= 0; shift -= 8) {
        bins[thread] = 0;
        __syncthreads();
        for (int b = first; b < last; b++) {
            const unsigned bits = ordered(scores[b]);
            if (shift == 24 || bits >> (shift + 8) == prefix) atomicAdd(&bins[bits >> shift & 255], 1);
        }
        __syncthreads();
        const int own = bins[255 - thread], greater = sums_of(own, scratch).before;
        if (greater < wanted && wanted <= greater + own) found[0] = 255 - thread, found[1] = wanted - greater;
        __syncthreads();
        prefix = prefix << 8 | unsigned(found[0]), wanted = found[1];
    }
    int equal = 0;
    for (int b = first; b < last; b++) equal += ordered(scores[b]) == prefix;
    int ties = wanted - sums_of(equal, scratch).before;
    for (int b = first; b < last; b++) {
        const unsigned bits = ordered(scores[b]);
        kept[b] = bits > prefix || (bits == prefix && ties-- > 0);
    }
    __syncthreads();

    int common = 0;
    for (int slot = thread; slot < count; slot += THREADS) common += kept[slots[slot]];
    common = sums_of(common, scratch).total;
    if (!step[FORCED] && common >= step[COMMON]) return;

    // What lies in a slot is not missing; the slots of the others are free.
    const int part = (count + THREADS - 1) / THREADS, begin = min(count, thread * part), end = min(count, begin + part);
    int leaving = 0;
    for (int slot = begin; slot < end; slot++) {
        if (kept[slots[slot]]) kept[slots[slot]] = 2;
        else leaving++;
    }
    const Sums leave = sums_of(leaving, scratch);
    int at = leave.before;
    for (int slot = begin; slot < end; slot++)
        if (!kept[slots[slot]]) free[at++] = slot;
    if (thread == 0) moved[0] = leave.total, moved[1]++, moved[2] += leave.total, slots[count] = tail;
    int missing = 0;
    for (int b = first; b < last; b++) missing += kept[b] == 1;
    at = sums_of(missing, scratch).before;  // with a barrier, behind which `free` is whole and `slots` has been read
    for (int b = first; b < last; b++) {
        if (kept[b] != 1) continue;
        from[at] = homes[b], to[at] = free[at], slots[free[at]] = b, at++;
    }
}
