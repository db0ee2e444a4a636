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
extern const float* const halves;  // the values of all 65536
}

inline float to_float(float x) { return x; }
#if defined(__F16C__)
inline float to_float(f16 x) {
    typedef short Halves __attribute__((vector_size(16)));
    return __builtin_ia32_vcvtph2ps(Halves{short(x.bits)})[0];
}
#else
inline float to_float(f16 x) { return emulation::halves[x.bits]; }
#endif
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

unsigned sub_f16x2(unsigned a, unsigned b);
unsigned fma_f16x2(unsigned a, unsigned b, unsigned c);

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : __builtin_exp2f(x); }  // flushed, as it says

inline float reciprocal_fast(float x) { return 1.0f / x; }

template <typename HALF>  // f16, bf16
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

void ldmatrix_x4(unsigned (&r)[4], const void* shared_row);
void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row);

void cp_async16(void* shared, const void* global, bool valid);
void cp_async_commit();
namespace emulation {
void wait_for_copies(int pending);
}
template <int PENDING>
void cp_async_wait() {
    emulation::wait_for_copies(PENDING);
}
