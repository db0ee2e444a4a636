// CPU twins of all that kernels_cu/ptx.cuh declares; its include guard is defined here, so that it stays out.
#pragma once

#include "machine.h"

#define SLIMRT_PTX_CUH
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = reinterpret_cast<TYPE*>(emulation::machine.shared)
#define FLOAT_INFINITY __int_as_float(0x7f800000)
#define FULL_WARP 0xffffffffu

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

namespace emulation {
struct Halves {
    std::vector<float> of;
    Halves() : of(65536) {
        for (unsigned bits = 0; bits < 65536; bits++) {
            const int exponent = bits >> 10 & 31, fraction = bits & 1023;
            float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction | 1024), exponent - 25);
            of[bits] = bits >> 15 ? -value : value;
        }
    }
};
static const Halves halves;
}  // namespace emulation

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return emulation::halves.of[x.bits]; }
inline float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <typename TO>
TO from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline f16 from_float<f16>(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: a sum whose last place is 2^-24 rounds as it should
        const float sum = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<unsigned short>(sign | (__float_as_uint(sum) - 0x3f000000))};
    }
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<unsigned short>(sign | ((rounded >> 13) - (112 << 10)))};
}
template <>
inline bf16 from_float<bf16>(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <typename TO>
unsigned pack(float low, float high) {
    return from_float<TO>(low).bits | unsigned(from_float<TO>(high).bits) << 16;
}

namespace emulation {
inline double half_of(unsigned pair, int i) { return to_float(f16{static_cast<unsigned short>(pair >> 16 * i)}); }
}  // namespace emulation
inline unsigned sub_f16x2(unsigned a, unsigned b) {
    using emulation::half_of;
    return pack<f16>(float(half_of(a, 0) - half_of(b, 0)), float(half_of(a, 1) - half_of(b, 1)));
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    using emulation::half_of;
    auto of = [=](int i) { return float(half_of(a, i) * half_of(b, i) + half_of(c, i)); };
    return pack<f16>(of(0), of(1));
}

inline float exp2_fast(float x) { return std::exp2(x); }

template <typename HALF>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Mma {
        float* d;
        const unsigned* a;
        unsigned b[2];
    } mine{d, a, {b0, b1}};
    emulation::collective(
        [](void** lanes) {
            auto low = [](unsigned pair) { return to_float(HALF{static_cast<unsigned short>(pair)}); };
            auto high = [](unsigned pair) { return to_float(HALF{static_cast<unsigned short>(pair >> 16)}); };
            float a[16][16], b[16][8], sum[16][8];
            for (int lane = 0; lane < 32; lane++) {
                const Mma& from = *static_cast<Mma*>(lanes[lane]);
                const int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
                    a[row][column] = low(from.a[i]), a[row][column + 1] = high(from.a[i]);
                }
                for (int i = 0; i < 2; i++) {
                    b[2 * t + 8 * i][g] = low(from.b[i]), b[2 * t + 8 * i + 1][g] = high(from.b[i]);
                }
                for (int i = 0; i < 4; i++) sum[g + 8 * (i / 2)][2 * t + i % 2] = from.d[i];
            }
            for (int row = 0; row < 16; row++)
                for (int k = 0; k < 16; k++)
                    for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
            for (int lane = 0; lane < 32; lane++) {
                const int g = lane / 4, t = lane % 4;
                float* to = static_cast<Mma*>(lanes[lane])->d;
                for (int i = 0; i < 4; i++) to[i] = sum[g + 8 * (i / 2)][2 * t + i % 2];
            }
        },
        &mine);
}

namespace emulation {
struct Matrices {
    unsigned* registers;
    const void* row;
};
template <bool TRANSPOSED>
void load_matrices(void** lanes) {
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short values[8][8];
        unsigned banks = 0;  // groups of four, 16 bytes: the eight rows must lie in different ones, or they come in turn
        for (int row = 0; row < 8; row++)
            banks |= 1u << reinterpret_cast<uintptr_t>(static_cast<Matrices*>(lanes[8 * matrix + row])->row) / 16 % 8;
        if (banks != 255) fail("ldmatrix: rows of one matrix lie in the same banks");
        for (int row = 0; row < 8; row++)
            std::memcpy(values[row], static_cast<Matrices*>(lanes[8 * matrix + row])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const unsigned low = TRANSPOSED ? values[t][g] : values[g][t];
            const unsigned high = TRANSPOSED ? values[t + 1][g] : values[g][t + 1];
            static_cast<Matrices*>(lanes[lane])->registers[matrix] = low | high << 16;
        }
    }
}
}  // namespace emulation

inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<false>, &mine);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row};
    emulation::collective(emulation::load_matrices<true>, &mine);
}

namespace emulation {
inline size_t chunk_of(const void* shared) { return size_t(static_cast<const char*>(shared) - machine.shared) / 16; }
inline void land(const Copy& copy) {
    if (machine.deferred) {
        if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
        else std::memset(copy.shared, 0, 16);
    }
    if (chunk_of(copy.shared) < machine.unfenced.size()) machine.current->landed.push_back(chunk_of(copy.shared));
}
}  // namespace emulation

inline void cp_async16(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
        emulation::fail("cp.async: an address is not aligned to 16 bytes");
    if (emulation::machine.deferred) std::memset(shared, 0xff, 16);
    else if (valid) std::memcpy(shared, global, 16);
    else std::memset(shared, 0, 16);
    emulation::machine.current->groups.back().push_back({shared, global, valid});
    const size_t chunk = emulation::chunk_of(shared);  // beyond the end in static shared memory, which wgmma does not read
    if (chunk < emulation::machine.unfenced.size()) emulation::machine.unfenced[chunk] = true;
}
inline void cp_async_commit() { emulation::machine.current->groups.emplace_back(); }
template <int PENDING>
void cp_async_wait() {
    auto& groups = emulation::machine.current->groups;
    while (int(groups.size()) - 1 > PENDING) {
        for (const emulation::Copy& copy : groups.front()) emulation::land(copy);
        groups.erase(groups.begin());
    }
}
