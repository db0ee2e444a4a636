// Weights as the kernels hold them, one struct for each GGML type. Embedding, dequantisation and all products read a type
// through this alone; `repack.cu` brings the file's blocks into this form when a model is loaded.
//
// The rows of a matrix are taken in *tiles* of 16, a tile in *cells* of 16 rows by UNITS times 32 weights, which lie one
// after the other: SIZE bytes, as many as the file has for them. A *unit* is 32 weights of a row. Within a cell the numbers
// come first, so that a warp reads them 16 bytes a lane and all lanes side by side: lane 4 g + t has units t, t + 4, ... of
// row g, then those of row g + 8. Scales follow. A width or number of rows that does not fill its last cell is padded with
// units whose scales are 0. F16 and BF16 are not packed: rows lie as in the file, and nothing is padded.
//
//   TYPE::unit(cell, r, u)  unit u of row r (0 to 15); `weight(i)` is its weight i in float32, bit-equal to ggml's,
//                           `pair<TO>(i)` weights i and i + 1 (i even) as two of TO in a register
//   operand(j, q)           for the tensor cores: the numbers of weights 8 j + 2 q and + 1, in the low ten bits of two
//                           halves. A number n there, read as f16, is n / 2^24, exactly: what is below the least normal
//                           number has no exponent. So nothing has to be converted. For q = 2 and 3 it is HIGH n: nibbles
//                           need not be shifted down from the upper half of a byte.
//   SUBS                    scales that a unit has (1 or 2, in equal parts): weight = scale[s] n + shift[s]
//
// Formats of the file: ggml-common.h.
#ifndef SLIMRT_QUANT_CUH
#define SLIMRT_QUANT_CUH

#include "ptx.cuh"

typedef unsigned char byte;

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

// A matrix [rows, width]. Tiles have rows in two runs of 8, `half` apart, so that rows that are wanted together (of a head
// the two of a rotated pair; gate and up) meet in one tile: 8, or a multiple of 8 such that 2 half divides rows.
struct Matrix {
    const byte* data;
    int rows, width, half;

    __device__ __forceinline__ int row(int tile, int r) const {
        const int tiles = half / 8;  // to a run
        return tile / tiles * 2 * half + tile % tiles * 8 + r % 8 + r / 8 * half;
    }
    __device__ __forceinline__ int tile_of(int row) const { return row / (2 * half) * (half / 8) + row % half / 8; }
    __device__ __forceinline__ int place_of(int row) const { return row % 8 + row / half % 2 * 8; }
    template <typename TYPE>
    __device__ __forceinline__ auto unit(int tile, int r, int u) const {
        if constexpr (TYPE::PACKED) {
            const int cells = (width / 32 + TYPE::UNITS - 1) / TYPE::UNITS;
            return TYPE::unit(data + ((long long)tile * cells + u / TYPE::UNITS) * TYPE::SIZE, r, u % TYPE::UNITS);
        } else {
            const int there = min(row(tile, r), rows - 1);  // past the end: the last one again, whose result nobody keeps
            return TYPE::unit(data + (there * (long long)width + 32 * u) * 2);
        }
    }
};

__device__ __forceinline__ float half_at(const byte* p) { return to_float(*reinterpret_cast<const f16*>(p)); }

// What units of numbers with scales have in common; NUMBERS has operand() and HIGH.
template <typename NUMBERS, int SCALES>
struct Scaled : NUMBERS {
    static constexpr int SUBS = SCALES;
    float scale[SCALES], shift[SCALES];

    __device__ __forceinline__ float weight(int i) const {
        const int q = i % 8 / 2, s = i * SCALES / 32;
        const unsigned n = (this->operand(i / 8, q) >> 16 * (i % 2) & 0xffff) >> (q / 2 && NUMBERS::HIGH == 16 ? 4 : 0);
        // The product is exact or the sum's rounding is the only one.
        return __fmaf_rn(scale[s], float(int(n)), shift[s]);
    }
    // In f16 two at once: laid under the exponent of 1024, which is then taken off. Scale and shift are rounded to f16 first.
    template <typename TO>
    __device__ __forceinline__ unsigned pair(int i) const {
        if constexpr (same<TO, f16>) {
            const int q = i % 8 / 2, s = i * SCALES / 32;
            const unsigned low = this->operand(i / 8, q) >> (q / 2 && NUMBERS::HIGH == 16 ? 4 : 0);
            const unsigned n = sub_f16x2(low | 0x64006400, 0x64006400);
            return fma_f16x2(n, pack<f16>(scale[s], scale[s]), pack<f16>(shift[s], shift[s]));
        } else {
            return pack<TO>(weight(i), weight(i + 1));
        }
    }
};

// 32 numbers of 4 bits and TOP more. Half h of word j has weights 8 j + h, + 4, + 2, + 6 from its low end on. The fifth
// bits, or fifth and sixth, lie so that one shift puts those of two operands in their places.
template <int TOP>
struct Nibbles {
    static constexpr int HIGH = 16;
    unsigned words[4], tops[TOP ? TOP : 1];

    __device__ __forceinline__ unsigned operand(int j, int q) const {
        const unsigned n = (q % 2 ? words[j] >> 8 : words[j]) & (q / 2 ? 0x00f000f0 : 0x000f000f);
        if constexpr (TOP == 0) {
            return n;
        } else {
            const int up = 4 - top_at(j, q);  // from where the bits of operand q % 2 lie to the place behind its numbers
            const unsigned bits = tops[TOP == 1 ? 0 : j / 2], top = up > 0 ? bits << up : bits >> -up;
            const unsigned mask = TOP == 1 ? 0x00100010 : 0x00300030;
            return n | (top & (q / 2 ? mask << 4 : mask));
        }
    }
    // The bit of its half where the top bits of operand (j, q % 2) begin; those of q % 2 + 2 are 4 further up.
    __device__ __forceinline__ static int top_at(int j, int q) {
        const int k = TOP == 1 ? 2 * j + q % 2 : j % 2 * 2 + q % 2, early = TOP == 1 ? 4 : 2;
        return TOP * (k % early) + k / early * 8;
    }
};

// 32 numbers of 8 bits: bytes 0 and 2 of a word are a pair, 1 and 3 the next. -128 is 0.
struct Bytes {
    static constexpr int HIGH = 1;
    unsigned words[8];

    __device__ __forceinline__ unsigned operand(int j, int q) const {
        return __byte_perm(words[2 * j + q / 2], 0, q % 2 ? 0x4341 : 0x4240);
    }
};

__device__ __forceinline__ void load16(unsigned (&words)[4], const byte* p) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// Which of the pieces that a row has in a cell, one for each unit, is unit u's of row r.
__device__ __forceinline__ int piece(int r, int u) { return (u / 4 * 2 + r / 8) * 32 + r % 8 * 4 + u % 4; }

// A cell of U units: 16 bytes of nibbles a unit, then its 4 TOP bytes of top bits.
template <int TOP, int U>
struct NibbleCell {
    static constexpr bool PACKED = true;
    static constexpr int UNITS = U, TOPS_AT = 256 * U, SCALES_AT = TOPS_AT + 64 * TOP * U;

    __device__ __forceinline__ static void numbers(Nibbles<TOP>& to, const byte* cell, int r, int u) {
        load16(to.words, cell + 16 * piece(r, u));
        if constexpr (TOP == 1) to.tops[0] = *reinterpret_cast<const unsigned*>(cell + TOPS_AT + 4 * piece(r, u));
        if constexpr (TOP == 2) {
            const uint2 v = *reinterpret_cast<const uint2*>(cell + TOPS_AT + 8 * piece(r, u));
            to.tops[0] = v.x, to.tops[1] = v.y;
        }
    }
};

// A scale for each unit, or scale and minimum. Without a minimum, weights are centred.
template <bool MINIMUM, int TOP>
struct Simple : NibbleCell<TOP, 4> {
    using Cell = NibbleCell<TOP, 4>;
    static constexpr int SIZE = Cell::SCALES_AT + (MINIMUM ? 256 : 128);

    __device__ __forceinline__ static Scaled<Nibbles<TOP>, 1> unit(const byte* cell, int r, int u) {
        Scaled<Nibbles<TOP>, 1> result;
        Cell::numbers(result, cell, r, u);
        const byte* scales = cell + Cell::SCALES_AT + (MINIMUM ? 4 : 2) * piece(r, u);
        if constexpr (MINIMUM) {
            const unsigned both = *reinterpret_cast<const unsigned*>(scales);
            result.scale[0] = to_float(f16{static_cast<unsigned short>(both)});
            result.shift[0] = to_float(f16{static_cast<unsigned short>(both >> 16)});
        } else {
            result.scale[0] = half_at(scales);
            result.shift[0] = (TOP ? -16.0f : -8.0f) * result.scale[0];
        }
        return result;
    }
};
struct Q4_0 : Simple<false, 0> {};
struct Q4_1 : Simple<true, 0> {};
struct Q5_0 : Simple<false, 1> {};
struct Q5_1 : Simple<true, 1> {};

struct Q8_0 {
    static constexpr bool PACKED = true;
    static constexpr int UNITS = 4, SIZE = 2048 + 128;

    __device__ __forceinline__ static Scaled<Bytes, 1> unit(const byte* cell, int r, int u) {
        Scaled<Bytes, 1> result;
        unsigned first[4], second[4];
        // The two halves of a unit lie 512 bytes apart, so that here too lanes read side by side.
        load16(first, cell + 16 * piece(r, u) + r / 8 * 512);
        load16(second, cell + 16 * piece(r, u) + r / 8 * 512 + 512);
        for (int i = 0; i < 4; i++) result.words[i] = first[i], result.words[4 + i] = second[i];
        result.scale[0] = half_at(cell + 2048 + 2 * piece(r, u));
        result.shift[0] = -128.0f * result.scale[0];
        return result;
    }
};

// 256 weights of a row have 16 bytes: two halves that scales and minima are multiples of, then of each unit a scale and a
// minimum of 6 bits, for units t and t + 4 together 24 bits: the lower 16 of t = 0 to 3, then the upper 8.
template <int TOP>
struct SuperScaled : NibbleCell<TOP, 8> {
    using Cell = NibbleCell<TOP, 8>;
    static constexpr int SIZE = Cell::SCALES_AT + 256;

    __device__ __forceinline__ static Scaled<Nibbles<TOP>, 1> unit(const byte* cell, int r, int u) {
        Scaled<Nibbles<TOP>, 1> result;
        Cell::numbers(result, cell, r, u);
        const byte* head = cell + Cell::SCALES_AT + 16 * r;
        const unsigned both = *reinterpret_cast<const unsigned*>(head);
        const unsigned lower = *reinterpret_cast<const unsigned short*>(head + 4 + 2 * (u % 4));
        const unsigned fields = (lower | head[12 + u % 4] << 16) >> 12 * (u / 4);
        result.scale[0] = to_float(f16{static_cast<unsigned short>(both)}) * float(int(fields & 63));
        result.shift[0] = -to_float(f16{static_cast<unsigned short>(both >> 16)}) * float(int(fields >> 6 & 63));
        return result;
    }
};
struct Q4_K : SuperScaled<0> {};
struct Q5_K : SuperScaled<1> {};

// 16 weights have a scale of 8 bits, 256 a half that these are multiples of; weights are centred.
struct Q6_K : NibbleCell<2, 8> {
    static constexpr int SIZE = SCALES_AT + 256 + 32;

    __device__ __forceinline__ static Scaled<Nibbles<2>, 2> unit(const byte* cell, int r, int u) {
        Scaled<Nibbles<2>, 2> result;
        numbers(result, cell, r, u);
        const unsigned both = *reinterpret_cast<const unsigned short*>(cell + SCALES_AT + 16 * r + 2 * u);
        const float scale = half_at(cell + SCALES_AT + 256 + 2 * r);
        for (int s = 0; s < 2; s++) {
            result.scale[s] = scale * float(int(static_cast<signed char>(both >> 8 * s)));
            result.shift[s] = -32.0f * result.scale[s];
        }
        return result;
    }
};

template <typename VALUE>
struct Plain {
    static constexpr bool PACKED = false;
    unsigned words[16];

    __device__ __forceinline__ static Plain unit(const byte* p) {
        Plain result;
        for (int i = 0; i < 16; i += 4) {
            unsigned four[4];
            load16(four, p + 4 * i);
            for (int k = 0; k < 4; k++) result.words[i + k] = four[k];
        }
        return result;
    }
    __device__ __forceinline__ float weight(int i) const {
        return to_float(VALUE{static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))});
    }
    template <typename TO>
    __device__ __forceinline__ unsigned pair(int i) const {
        if constexpr (same<TO, VALUE>) return words[i / 2];
        else return pack<TO>(weight(i), weight(i + 1));
    }
};
struct F16 : Plain<f16> {};
struct BF16 : Plain<bf16> {};

#endif
