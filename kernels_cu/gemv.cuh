// The linear layers of one token: y = weight x, weights read once, as they lie. Memory is the limit, so bytes must always be
// under way and unpacking must not become the work.
//
// Persistent blocks of 8 warps share the tiles of 16 rows. Of a tile, warp w takes cells w, w + 8, ...; the cells that it
// will need next, of the next tile too, are under way into its own ring of STAGES stages of shared memory, whatever the
// block is doing. Only at the end of a tile do the warps meet, to join their sums.
//
// Tensor cores multiply numbers, not weights (`operand` of quant.cuh needs one or two instructions for two numbers); the
// scales come afterwards, once for each unit. Operand a is 16 rows by 16 columns, four of each of the units that the lanes
// t = lane % 4 hold; of operand b the column 2 t has the four columns of x that belong to lane t, and zeros for the others.
// So column 2 t of the result, which is in lane t's first and third register, is the sum over lane t's unit, and it
// multiplies it by that unit's scale. What scale * n + shift adds in `shift` is the sum of x over the unit, which is known.
//
// x comes as T, or as the residual stream in float32 and is normed here (FROM=float): x / sqrt(mean(x^2) + eps) * gain. Each
// block does that for itself, while its first weights come. It lies in shared memory as f16, times a power of two that puts
// its greatest number below 2^15 where it might not fit otherwise; where weights and T are both bf16, as bf16.
//
// Macros: TYPE, T, FROM=float or T's type, STAGES, BLOCKS (that a multiprocessor should hold at once).
#ifndef SLIMRT_GEMV_CUH
#define SLIMRT_GEMV_CUH

#include "quant.cuh"
#include "reduce.cuh"

#ifndef BLOCKS
#define BLOCKS 2
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr bool BRAINS = same<TYPE, BF16> && same<T, bf16>;  // both operands are bf16
constexpr bool NORMED = same<FROM, float>, SCALED = !BRAINS && (NORMED || same<T, bf16>);

template <bool FIRST, typename A, typename B>
struct Either {
    typedef A type;
};
template <typename A, typename B>
struct Either<false, A, B> {
    typedef B type;
};
typedef typename Either<BRAINS, bf16, f16>::type M;  // what is multiplied

// A cell as the kernel sees it: COLUMNS of 16 rows, SIZE bytes, in which x is summed over GROUP columns for each scale.
template <typename KIND, bool PACKED>
struct CellOf {
    static constexpr int COLUMNS = 32 * KIND::UNITS, SIZE = KIND::SIZE;
    typedef decltype(KIND::unit(nullptr, 0, 0)) Unit;
    static constexpr int SUBS = Unit::SUBS, HIGH = Unit::HIGH, GROUP = 32 / SUBS;
    static constexpr float POWER = HIGH / 16777216.0f;  // that operands are multiplied by

    const byte* from;  // of the warp's next cell, this lane's first 16 bytes

    __device__ __forceinline__ static int count(int width) { return (width + COLUMNS - 1) / COLUMNS; }
    __device__ __forceinline__ void enter(const Matrix& matrix, int tile, int cell) {
        from = matrix.data + ((long long)tile * count(matrix.width) + cell) * SIZE + threadIdx.x % 32 * 16;
    }
    __device__ __forceinline__ void fetch(byte* stage, const Matrix&, int) {
        byte* to = stage + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < SIZE / 512; i++) cp_async16(to + 512 * i, from + 512 * i, true);
        if (SIZE % 512 && threadIdx.x % 32 < SIZE % 512 / 16) cp_async16(to + SIZE / 512 * 512, from + SIZE / 512 * 512, true);
        from += WARPS * SIZE;
    }
    // Adds the products of rows lane / 4 (early) and + 8 (late); x: zeros, then the columns; sums: of x, one a GROUP.
    __device__ __forceinline__ static void multiply(float& early, float& late, const byte* stage, const uint4* x,
                                                    const float* sums, int cell, bool own) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const uint4* columns = x + (own ? 4 + (cell * KIND::UNITS + t) * 4 : 0);
        const int step = own ? 16 : 0;
        sums += (cell * KIND::UNITS + t) * SUBS;
#pragma unroll
        for (int i = 0; i < KIND::UNITS / 4; i++, columns += step, sums += 4 * SUBS) {
            const Unit a = KIND::unit(stage, g, 4 * i + t), b = KIND::unit(stage, g + 8, 4 * i + t);
            float low[SUBS][4] = {}, high[SUBS][4] = {};  // of operands 0 and 1, of 2 and 3
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 eight = columns[j];
                const unsigned first[4] = {a.operand(j, 0), b.operand(j, 0), a.operand(j, 1), b.operand(j, 1)};
                const unsigned second[4] = {a.operand(j, 2), b.operand(j, 2), a.operand(j, 3), b.operand(j, 3)};
                mma_m16n8k16<M>(low[j * SUBS / 4], first, eight.x, eight.y);
                mma_m16n8k16<M>(high[j * SUBS / 4], second, eight.z, eight.w);
            }
#pragma unroll
            for (int s = 0; s < SUBS; s++) {
                const float sum = sums[s];
                early += a.scale[s] * (HIGH * low[s][0] + high[s][0]) + a.shift[s] * sum;
                late += b.scale[s] * (HIGH * low[s][2] + high[s][2]) + b.shift[s] * sum;
            }
        }
    }
};

// Rows as in the file: 64 columns of 16 rows. A row's 8 pieces of 16 bytes lie in shared memory so that the four lanes of
// two rows read from different banks.
template <typename KIND>
struct CellOf<KIND, false> {
    static constexpr int COLUMNS = 64, SIZE = 2048, GROUP = 32;
    static constexpr float POWER = 1.0f;

    const byte* from;  // of the warp's next cell, this lane's first 16 bytes
    int row;

    __device__ __forceinline__ static int count(int width) { return (width + COLUMNS - 1) / COLUMNS; }
    __device__ __forceinline__ void enter(const Matrix& matrix, int tile, int cell) {
        row = matrix.row(tile, threadIdx.x % 32 / 8);
        from = matrix.data + (row * (long long)matrix.width + 64 * cell + 8 * (threadIdx.x % 8)) * 2;
    }
    __device__ __forceinline__ void fetch(byte* stage, const Matrix& matrix, int cell) {
        const int r = threadIdx.x % 32 / 8, part = threadIdx.x % 8;
        const bool inside = 64 * cell + 8 * part < matrix.width;
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const int on = i % 8 + i / 8 * matrix.half;
            cp_async16(stage + 128 * (i + r) + 16 * (part ^ r % 2 * 4), from + on * (long long)matrix.width * 2,
                       inside && row + on < matrix.rows);
        }
        from += WARPS * 128;
    }
    __device__ __forceinline__ static unsigned operand(unsigned pair) {
        if constexpr (same<KIND, BF16> && !BRAINS)
            return pack<f16>(to_float(bf16{static_cast<unsigned short>(pair)}), to_float(bf16{static_cast<unsigned short>(pair >> 16)}));
        else return pair;
    }
    __device__ __forceinline__ static void multiply(float& early, float& late, const byte* stage, const uint4* x, const float*,
                                                    int cell, bool own) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float sums[2][4] = {};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint4* piece = reinterpret_cast<const uint4*>(stage) + 8 * g + (t + 4 * c ^ g % 2 * 4);
            const uint4 a = piece[0], b = piece[64], eight = x[own ? 4 + cell * 8 + t + 4 * c : 0];
            const unsigned first[4] = {operand(a.x), operand(b.x), operand(a.y), operand(b.y)};
            const unsigned second[4] = {operand(a.z), operand(b.z), operand(a.w), operand(b.w)};
            mma_m16n8k16<M>(sums[0], first, eight.x, eight.y);
            mma_m16n8k16<M>(sums[1], second, eight.z, eight.w);
        }
        early += sums[0][0] + sums[1][0];
        late += sums[0][2] + sums[1][2];
    }
};
typedef CellOf<TYPE, TYPE::PACKED> Cell;

// Eight columns of x from i on, in float32; zeros past the end.
__device__ __forceinline__ void load_columns(float (&to)[8], const float* x, int i, int width) {
    for (int k = 0; k < 8; k += 4) {
        const float4 v = i < width ? *reinterpret_cast<const float4*>(x + i + k) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
    }
}
template <typename HALF>
__device__ __forceinline__ void load_columns(float (&to)[8], const HALF* x, int i, int width) {
    const uint4 v = i < width ? *reinterpret_cast<const uint4*>(x + i) : make_uint4(0, 0, 0, 0);
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    for (int k = 0; k < 8; k++) to[k] = to_float(HALF{static_cast<unsigned short>(words[k / 2] >> 16 * (k % 2))});
}

// x [width] as M to `to` (after 64 bytes of zeros), and the sums of what is written to `sums`. Returns what the product has to
// be multiplied by.
__device__ __forceinline__ float take_x(const FROM* x, const float* gain, float eps, int width, int padded, uint4* to,
                                        float* sums) {
    __shared__ float scratch[2][WARPS];
    float factor = 1.0f, back = 1.0f;
    if (threadIdx.x < 4) to[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if constexpr (NORMED || SCALED) {
        float square = 0.0f, most = 0.0f;
        for (int i = 8 * threadIdx.x; i < width; i += 8 * THREADS) {
            float v[8], g[8];
            load_columns(v, x, i, width);
            if constexpr (NORMED) load_columns(g, gain, i, width);
            for (int k = 0; k < 8; k++) {
                square += v[k] * v[k];
                most = fmaxf(most, fabsf(NORMED ? v[k] * g[k] : v[k]));
            }
        }
        square = warp_reduce<Sum>(square), most = warp_reduce<Max>(most);
        if (threadIdx.x % 32 == 0) scratch[0][threadIdx.x / 32] = square, scratch[1][threadIdx.x / 32] = most;
        __syncthreads();
        square = 0.0f, most = 0.0f;
        for (int w = 0; w < WARPS; w++) square += scratch[0][w], most = fmaxf(most, scratch[1][w]);
        if constexpr (NORMED) factor = rsqrtf(square / width + eps);
        if constexpr (SCALED) {  // 2^14 <= most * scale < 2^15 unless it is tiny; both powers of two are normal numbers
            const int exponent = max(15, int(__float_as_uint(most * factor) >> 23));
            factor *= __uint_as_float(unsigned(268 - exponent) << 23);
            back = __uint_as_float(unsigned(exponent - 14) << 23);
        }
    }
    for (int base = 0; base < padded; base += 8 * THREADS) {
        const int i = base + 8 * threadIdx.x;
        float v[8], sum = 0.0f;
        load_columns(v, x, i, width);
        if constexpr (NORMED) {
            float g[8];
            load_columns(g, gain, i, width);
            for (int k = 0; k < 8; k++) v[k] *= factor * g[k];
        } else if constexpr (SCALED) {
            for (int k = 0; k < 8; k++) v[k] *= factor;
        }
        unsigned words[4];
        for (int k = 0; k < 4; k++) {
            words[k] = pack<M>(v[2 * k], v[2 * k + 1]);
            sum += to_float(M{static_cast<unsigned short>(words[k])}) + to_float(M{static_cast<unsigned short>(words[k] >> 16)});
        }
        if (i < padded) to[4 + i / 8] = make_uint4(words[0], words[1], words[2], words[3]);
        if constexpr (TYPE::PACKED) {
            for (int mask = Cell::GROUP / 16; mask; mask /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
            if (i < padded && i % Cell::GROUP == 0) sums[i / Cell::GROUP] = sum * Cell::POWER;
        }
    }
    __syncthreads();
    return back / Cell::POWER;
}

typedef float Partial[2][WARPS][16];  // of two tiles in turn: each warp's sums

// Shared memory of its own function: declared within a template the emulation would not know it (tests/emulation).
__device__ __forceinline__ Partial& partial_sums() {
    __shared__ Partial sums;
    return sums;
}

// For each tile that this block has, `finish(row, y, partner)` in lanes of one warp: y is the product of `row`, `partner`
// that of the row `half` further on, or before. All lanes call it, r = lane % 16 is the row's place in its tile; lanes from
// 16 on repeat the others. Dynamic shared memory: 64 + 8 STAGES SIZE + 2 padded + (packed: 4 padded / GROUP) bytes, with
// padded = COLUMNS * cells.
template <typename Finish>
__device__ __forceinline__ void product(const Matrix& matrix, const FROM* x, const float* gain, float eps, Finish finish) {
    DYNAMIC_SHARED(byte, shared);
    Partial& partial = partial_sums();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int cells = Cell::count(matrix.width), tiles = (matrix.rows + 15) / 16, padded = cells * Cell::COLUMNS;
    byte* const ring = shared + warp * STAGES * Cell::SIZE;
    uint4* const columns = reinterpret_cast<uint4*>(shared + WARPS * STAGES * Cell::SIZE);
    float* const sums = reinterpret_cast<float*>(columns + 4 + padded / 8);

    Cell next;
    int next_tile = warp < cells ? blockIdx.x : tiles, next_cell = warp, next_stage = 0;
    if (next_tile < tiles) next.enter(matrix, next_tile, warp);
    auto fetch = [&]() {
        if (next_tile < tiles) {
            next.fetch(ring + next_stage * Cell::SIZE, matrix, next_cell);
            next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
            next_cell += WARPS;
            if (next_cell >= cells) {
                next_cell = warp, next_tile += gridDim.x;
                if (next_tile < tiles) next.enter(matrix, next_tile, warp);
            }
        }
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch();
    const float factor = take_x(x, gain, eps, matrix.width, padded, columns, sums);

    const bool own = lane / 4 == 2 * (lane % 4);  // of the operand with x this lane has a column that counts
    int stage = 0, parity = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        float early = 0.0f, late = 0.0f;
        for (int cell = warp; cell < cells; cell += WARPS) {
            cp_async_wait<STAGES - 2>();
            __syncwarp();  // the other lanes' copies have landed too, and all have read the stage that is filled next
            fetch();
            Cell::multiply(early, late, ring + stage * Cell::SIZE, columns, sums, cell, own);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        for (int mask = 1; mask < 4; mask *= 2) {
            early += __shfl_xor_sync(FULL_WARP, early, mask);
            late += __shfl_xor_sync(FULL_WARP, late, mask);
        }
        if (lane % 4 == 0) partial[parity][warp][lane / 4] = early, partial[parity][warp][lane / 4 + 8] = late;
        __syncthreads();  // the one of the next tile keeps `parity` from being written before it has been read
        if (warp == 0) {
            float y = 0.0f;
            for (int w = 0; w < WARPS; w++) y += partial[parity][w][lane % 16];
            y *= factor;
            finish(matrix.row(tile, lane % 16), y, __shfl_xor_sync(FULL_WARP, y, 8));
        }
    }
}

#endif
