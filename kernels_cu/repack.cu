// The file's blocks into the cells of quant.cuh, once, when a model is loaded: the same bits in another order.
//
//   file [count, row bytes of TYPE]: rows `first` and on of a matrix [rows, width] whose cells are `out`; what pads the
//   last cells is left as it is (zeros). grid (ceil(count * width / 32 / 128)), block 128: a thread brings one unit.
//
// A file's block is read through `number(block, i)`, the number n of weight i as quant.cuh means it, never negative.
#include "quant.cuh"

// `low` of block: four bits of weight i, from the low nibbles of 16 or 32 bytes and then their high ones.
__device__ __forceinline__ unsigned nibble(const byte* low, int i, int run) { return low[i % run] >> 4 * (i / run) & 15; }

template <bool MINIMUM, bool FIFTH>
struct SimpleBlock {
    static constexpr int VALUES = 32, BITS_AT = MINIMUM ? 4 : 2, PACKED_AT = BITS_AT + (FIFTH ? 4 : 0), SIZE = PACKED_AT + 16;

    __device__ static unsigned number(const byte* block, int i) {
        const unsigned fifth = FIFTH ? block[BITS_AT + i / 8] >> i % 8 & 1 : 0;
        return nibble(block + PACKED_AT, i, 16) | fifth << 4;
    }
    __device__ static void scales(const byte* block, byte* cell, int r, int u) {
        constexpr int BYTES = MINIMUM ? 4 : 2;
        for (int i = 0; i < BYTES; i++) cell[TYPE::SIZE - 64 * BYTES + BYTES * piece(r, u) + i] = block[i];
    }
};

struct ByteBlock {
    static constexpr int VALUES = 32, SIZE = 34;

    __device__ static unsigned number(const byte* block, int i) { return block[2 + i] ^ 0x80; }
    __device__ static void scales(const byte* block, byte* cell, int r, int u) {
        for (int i = 0; i < 2; i++) cell[2048 + 2 * piece(r, u) + i] = block[i];
    }
};

// Two halves, 8 scales and 8 minima of 6 bits in 12 bytes, [32 bytes of fifth bits: bit k of byte i belongs to weight
// 32 k + i], 128 bytes of nibbles, of which 32 have 64 weights.
template <bool FIFTH>
struct SuperBlock {
    static constexpr int VALUES = 256, PACKED_AT = FIFTH ? 48 : 16, SIZE = PACKED_AT + 128;

    __device__ static unsigned number(const byte* block, int i) {
        const unsigned fifth = FIFTH ? block[16 + i % 32] >> i / 32 & 1 : 0;
        return nibble(block + PACKED_AT + i / 64 * 32, i % 64, 32) | fifth << 4;
    }
    // Of the first four units the low 6 bits of bytes u (scale) and 4 + u (minimum), of the others 4 bits of byte 4 + u and
    // the top 2 bits of the bytes of the first four.
    __device__ static unsigned fields(const byte* packed, int u) {
        if (u < 4) return (packed[u] & 63) | (packed[4 + u] & 63) << 6;
        return (packed[4 + u] & 15) | packed[u - 4] >> 6 << 4 | (packed[4 + u] >> 4 | packed[u] >> 6 << 4) << 6;
    }
    __device__ static void scales(const byte* block, byte* cell, int r, int u) {
        byte* head = cell + TYPE::SIZE - 256 + 16 * r;
        if (u == 0)
            for (int i = 0; i < 4; i++) head[i] = block[i];
        if (u >= 4) return;  // the thread of unit u brings the fields of u + 4 as well
        const unsigned both = fields(block + 4, u) | fields(block + 4, u + 4) << 12;
        head[4 + 2 * u] = both & 255, head[5 + 2 * u] = both >> 8 & 255, head[12 + u] = both >> 16;
    }
};

// Two halves of 128 weights, each 64 bytes of low nibbles and 32 bytes of four 2-bit tops; 16 scales of 8 bits; a half.
struct SixBlock {
    static constexpr int VALUES = 256, SIZE = 210;

    __device__ static unsigned number(const byte* block, int i) {
        const int at = i / 128, k = i % 128;
        const unsigned top = block[128 + 32 * at + k % 32] >> 2 * (k / 32) & 3;
        return nibble(block + 64 * at, k, 64) | top << 4;
    }
    __device__ static void scales(const byte* block, byte* cell, int r, int u) {
        byte* scales = cell + TYPE::SIZE - 288;
        for (int i = 0; i < 2; i++) scales[16 * r + 2 * u + i] = block[192 + 2 * u + i];
        if (u == 0)
            for (int i = 0; i < 2; i++) scales[256 + 2 * r + i] = block[208 + i];
    }
};

template <typename KIND>
struct BlockOf;
template <> struct BlockOf<Q4_0> : SimpleBlock<false, false> {};
template <> struct BlockOf<Q4_1> : SimpleBlock<true, false> {};
template <> struct BlockOf<Q5_0> : SimpleBlock<false, true> {};
template <> struct BlockOf<Q5_1> : SimpleBlock<true, true> {};
template <> struct BlockOf<Q8_0> : ByteBlock {};
template <> struct BlockOf<Q4_K> : SuperBlock<false> {};
template <> struct BlockOf<Q5_K> : SuperBlock<true> {};
template <> struct BlockOf<Q6_K> : SixBlock {};

// The numbers of weights `start` and on of a block into the places of unit u of row r.
template <int TOP, int U>
__device__ void store(const NibbleCell<TOP, U>*, const byte* block, int start, byte* cell, int r, int u) {
    unsigned words[4] = {}, tops[2] = {};
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const unsigned n = BlockOf<TYPE>::number(block, start + i);
        const int j = i / 8, q = i % 8 / 2, half = 16 * (i % 2);
        words[j] |= (n & 15) << (8 * (q % 2) + 4 * (q / 2) + half);
        if constexpr (TOP > 0) tops[TOP == 1 ? 0 : j / 2] |= n >> 4 << (Nibbles<TOP>::top_at(j, q) + 4 * (q / 2) + half);
    }
    *reinterpret_cast<uint4*>(cell + 16 * piece(r, u)) = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int k = 0; k < TOP; k++) reinterpret_cast<unsigned*>(cell + 256 * U)[TOP * piece(r, u) + k] = tops[k];
}
__device__ void store(const Q8_0*, const byte* block, int start, byte* cell, int r, int u) {
    for (int h = 0; h < 2; h++) {
        unsigned words[4] = {};
        for (int i = 0; i < 16; i++)
            words[i / 4] |= BlockOf<TYPE>::number(block, start + 16 * h + i) << (16 * (i % 2) + 8 * (i % 4 / 2));
        byte* to = cell + 16 * piece(r, u) + 512 * (r / 8 + h);
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

extern "C" __global__ void __launch_bounds__(128)
repack(const byte* file, byte* out, int first, int count, int rows, int width, int half) {
    using Block = BlockOf<TYPE>;
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const int units = width / 32, u = i % units, line = i / units;
    if (i >= (long long)count * units) return;
    const Matrix matrix = {out, rows, width, half};
    const int tile = matrix.tile_of(first + line), r = matrix.place_of(first + line);
    const int cells = (units + TYPE::UNITS - 1) / TYPE::UNITS;
    const int within = 32 * u % Block::VALUES;
    const byte* block = file + (line * (long long)(width / Block::VALUES) + 32 * u / Block::VALUES) * Block::SIZE;
    byte* cell = out + ((long long)tile * cells + u / TYPE::UNITS) * TYPE::SIZE;
    store(static_cast<const TYPE*>(nullptr), block, within, cell, r, u % TYPE::UNITS);
    Block::scales(block, cell, r, u % TYPE::UNITS);
}
