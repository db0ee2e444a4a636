// GGML's packed types, one struct each, all through one notion: a *unit* of 32 weights in two runs of 16. Embedding,
// dequantisation and GEMV read a type through this alone.
//
//   SIZE bytes hold VALUES weights in UNITS units; `unit(block, u)` reads unit u; its runs are weights `first(u)` and
//   `second(u)` of the block, 16 from each on. Of a unit, `weight(i)` is weight i in float32, bit-equal to ggml's, and
//   `pair<TO>(i)` weights i and i + 1 (i even) as two of TO in a register.
//
// Formats: ggml-common.h. Blocks of 18, 22, 34 and 210 bytes are aligned to 2 only, so bytes come in as alignment allows.
#ifndef SLIMRT_QUANT_CUH
#define SLIMRT_QUANT_CUH

#include "ptx.cuh"

typedef unsigned char byte;

template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

// 32 numbers n of a byte each; every run of 16 is an affine image of them, scale * n + shift.
struct Bytes {
    unsigned words[8];
    float scale[2], shift[2];

    // n laid under the exponent of 2^23, which is then taken off: a conversion has a quarter of the rate. The product is
    // exact or the sum's rounding is the only one.
    __device__ __forceinline__ float weight(int i) const {
        const float n = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000, 0x7440 + i % 4)) - 8388608.0f;
        return __fmaf_rn(scale[i / 16], n, shift[i / 16]);
    }

    // In f16 the same goes for two numbers at once, with 1024 for 2^23. Scale and shift are rounded to f16 first.
    template <typename TO>
    __device__ __forceinline__ unsigned pair(int i) const {
        if constexpr (same<TO, f16>) {
            // threadIdx.y is 0, which the compiler cannot know: a constant it would move into a register for each use.
            const unsigned top = 0x64646464 + threadIdx.y;
            const unsigned n = sub_f16x2(__byte_perm(words[i / 4], top, i % 4 ? 0x4342 : 0x4140), 0x64006400);
            return fma_f16x2(n, pack<f16>(scale[i / 16], scale[i / 16]), pack<f16>(shift[i / 16], shift[i / 16]));
        } else {
            return pack<TO>(weight(i), weight(i + 1));
        }
    }
};

__device__ __forceinline__ float half_at(const byte* p) { return to_float(*reinterpret_cast<const f16*>(p)); }

// 4 N bytes from an address that is a multiple of ALIGN. Where that is 2, every second address lies across words: whole
// words are read all the same, the halves of two are put together, and the last half alone (nothing past the end).
template <int N, int ALIGN>
__device__ __forceinline__ void load_words(unsigned (&words)[N], const byte* p) {
    if constexpr (ALIGN == 16) {
        for (int i = 0; i < N; i += 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(p + 4 * i);
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        }
    } else {
        const bool across = ALIGN == 2 && reinterpret_cast<unsigned long long>(p) % 4;
        const unsigned* whole = reinterpret_cast<const unsigned*>(p - 2 * across);
        for (int i = 0; i < N; i++) words[i] = whole[i];
        if constexpr (ALIGN == 2) {
            const unsigned last = *reinterpret_cast<const unsigned short*>(whole + (across ? N : 0));
            const unsigned both = across ? 0x5432 : 0x3210;
            for (int i = 0; i < N; i++) words[i] = __byte_perm(words[i], i + 1 < N ? words[i + 1] : last, both);
        }
    }
}

// 16 bytes of nibbles -> bytes 0 to 15 from the low and 16 to 31 from the high ones; `low` and `high` are or'ed in.
__device__ __forceinline__ void spread_nibbles(unsigned (&words)[8], const unsigned (&packed)[4], const unsigned (&low)[4],
                                               const unsigned (&high)[4]) {
    for (int i = 0; i < 4; i++) {
        words[i] = (packed[i] & 0x0f0f0f0f) | low[i];
        words[4 + i] = (packed[i] >> 4 & 0x0f0f0f0f) | high[i];
    }
}

// Bits 4 i to 4 i + 3 of `bits`, each to bit 4 of a byte of its own.
__device__ __forceinline__ unsigned fifth_bits(unsigned bits, int i) {
    const unsigned four = bits >> 4 * i & 15;
    return (four & 1) << 4 | (four & 2) << 11 | (four & 4) << 18 | (four & 8) << 25;
}

// One block is one unit.
struct Simple {
    static constexpr int VALUES = 32, UNITS = 1;
    __device__ static int first(int) { return 0; }
    __device__ static int second(int) { return 16; }
};

// Types of 256 weights: unit u covers 16 bytes, half u % 2 of byte group u / 2, whose low nibbles are 32 weights and whose
// high nibbles the next 32.
struct Super {
    static constexpr int VALUES = 256, UNITS = 8;
    __device__ static int first(int u) { return 64 * (u / 2) + 16 * (u % 2); }
    __device__ static int second(int u) { return first(u) + 32; }
};

template <typename VALUE>
struct Plain : Simple {
    static constexpr int SIZE = 64;

    unsigned words[16];

    __device__ __forceinline__ static Plain unit(const byte* block, int) {
        Plain result;
        load_words<16, 16>(result.words, block);
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

// scale, [minimum], [32 fifth bits], 16 bytes of nibbles. Without a minimum, weights are centred.
template <bool MINIMUM, bool FIFTH>
struct Nibbles : Simple {
    static constexpr int BITS_AT = MINIMUM ? 4 : 2, PACKED_AT = BITS_AT + (FIFTH ? 4 : 0), SIZE = PACKED_AT + 16;
    static constexpr int ALIGN = SIZE % 4 ? 2 : 4;
    __device__ __forceinline__ static Bytes unit(const byte* block, int) {
        Bytes result;
        unsigned packed[4], low[4] = {}, high[4] = {}, bits[1];
        load_words<4, ALIGN>(packed, block + PACKED_AT);
        if constexpr (FIFTH) {
            load_words<1, ALIGN>(bits, block + BITS_AT);
            for (int i = 0; i < 4; i++) low[i] = fifth_bits(bits[0], i), high[i] = fifth_bits(bits[0], 4 + i);
        }
        spread_nibbles(result.words, packed, low, high);
        const float scale = half_at(block);
        result.scale[0] = result.scale[1] = scale;
        result.shift[0] = result.shift[1] = MINIMUM ? half_at(block + 2) : (FIFTH ? -16.0f : -8.0f) * scale;
        return result;
    }
};
struct Q4_0 : Nibbles<false, false> {};
struct Q4_1 : Nibbles<true, false> {};
struct Q5_0 : Nibbles<false, true> {};
struct Q5_1 : Nibbles<true, true> {};

struct Q8_0 : Simple {
    static constexpr int SIZE = 34;
    __device__ __forceinline__ static Bytes unit(const byte* block, int) {
        Bytes result;
        load_words<8, 2>(result.words, block + 2);
        for (int i = 0; i < 8; i++) result.words[i] ^= 0x80808080;  // -128 becomes 0
        const float scale = half_at(block);
        result.scale[0] = result.scale[1] = scale, result.shift[0] = result.shift[1] = -128.0f * scale;
        return result;
    }
};

// Two halves for scales and minima, 8 scales and 8 minima of 6 bits in 12 bytes, [32 bytes of fifth bits: bit i of byte j
// belongs to weight 32 i + j], 128 bytes of nibbles.
template <bool FIFTH>
struct Scaled : Super {
    static constexpr int PACKED_AT = FIFTH ? 48 : 16, SIZE = PACKED_AT + 128;
    __device__ __forceinline__ static Bytes unit(const byte* block, int u) {
        Bytes result;
        unsigned packed[4], low[4] = {}, high[4] = {}, tops[4];
        load_words<4, 16>(packed, block + PACKED_AT + 16 * u);
        if constexpr (FIFTH) {
            load_words<4, 16>(tops, block + 16 + 16 * (u % 2));
            for (int i = 0; i < 4; i++) {
                low[i] = (tops[i] >> 2 * (u / 2) & 0x01010101) << 4;
                high[i] = (tops[i] >> (2 * (u / 2) + 1) & 0x01010101) << 4;
            }
        }
        spread_nibbles(result.words, packed, low, high);
        // Two neighbouring sub-blocks of 32 weights, so two scales and two minima, each pair in two bytes: of the first four
        // sub-blocks the low 6 bits, of the others 4 bits elsewhere and the top 2 bits of the first four.
        unsigned head[4];
        load_words<4, 16>(head, block);
        const int down = 16 * (u / 2 % 2);
        const unsigned a = head[1] >> down, b = head[2] >> down, c = head[3] >> down;
        const bool early = u < 4;
        const unsigned scales = early ? a & 0x3f3f : (c & 0x0f0f) | (a >> 2 & 0x3030);
        const unsigned minima = early ? b & 0x3f3f : (c >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
        const float scale = to_float(f16{static_cast<unsigned short>(head[0])});
        const float minimum = to_float(f16{static_cast<unsigned short>(head[0] >> 16)});
        for (int i = 0; i < 2; i++) {
            result.scale[i] = scale * (scales >> 8 * i & 63);
            result.shift[i] = -minimum * (minima >> 8 * i & 63);
        }
        return result;
    }
};
struct Q4_K : Scaled<false> {};
struct Q5_K : Scaled<true> {};

// Two halves of 128 weights, each 64 bytes of low nibbles and 32 bytes of four 2-bit tops; 16 scales of 8 bits; a half.
// The low and the high nibbles of a byte are 64 weights apart here.
struct Q6_K : Super {
    static constexpr int SIZE = 210;
    __device__ static int first(int u) { return 128 * (u / 4) + 16 * (u % 4); }
    __device__ static int second(int u) { return first(u) + 64; }
    __device__ __forceinline__ static Bytes unit(const byte* block, int u) {
        Bytes result;
        unsigned packed[4], low[4], high[4], tops[4];
        load_words<4, 2>(packed, block + 16 * u);
        load_words<4, 2>(tops, block + 128 + 32 * (u / 4) + 16 * (u % 2));
        const int at = 2 * (u / 2 % 2);  // of the tops: bits 0 and 4, or 2 and 6
        for (int i = 0; i < 4; i++) {
            low[i] = (tops[i] >> at & 0x03030303) << 4;
            high[i] = (tops[i] >> (at + 4) & 0x03030303) << 4;
        }
        spread_nibbles(result.words, packed, low, high);
        const signed char* scales = reinterpret_cast<const signed char*>(block + 192);
        const float scale = half_at(block + 208);
        for (int i = 0; i < 2; i++) {
            result.scale[i] = scale * scales[8 * (u / 4) + u % 4 + 4 * i];
            result.shift[i] = -32.0f * result.scale[i];
        }
        return result;
    }
};

#endif
