// What twins.h declares: a part of runtime.cpp.
#pragma once

#include "state.h"

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
static const Halves table;
const float* const halves = table.of.data();
}  // namespace emulation


namespace emulation {
static double half_of(unsigned pair, int i) { return to_float(f16{static_cast<unsigned short>(pair >> 16 * i)}); }
}  // namespace emulation
unsigned sub_f16x2(unsigned a, unsigned b) {
    using emulation::half_of;
    return pack<f16>(float(half_of(a, 0) - half_of(b, 0)), float(half_of(a, 1) - half_of(b, 1)));
}
unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    using emulation::half_of;
    auto of = [=](int i) { return float(half_of(a, i) * half_of(b, i) + half_of(c, i)); };
    return pack<f16>(of(0), of(1));
}


namespace emulation {
// `count` numbers, a multiple of 8.
template <typename HALF>
static void widen(float* out, const unsigned short* bits, int count) {
    for (int i = 0; i < count; i++) out[i] = to_float(HALF{bits[i]});
}
#if defined(__F16C__)
template <>
void widen<f16>(float* out, const unsigned short* bits, int count) {
    typedef short Halves __attribute__((vector_size(16)));
    for (int i = 0; i < count; i += 8) {
        Halves some;
        std::memcpy(&some, bits + i, 16);
        const auto wide = __builtin_ia32_vcvtph2ps256(some);
        std::memcpy(out + i, &wide, 32);
    }
}
#endif
}  // namespace emulation

template <typename HALF>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Mma {
        float* d;
        const unsigned* a;
        unsigned b[2];
    } mine{d, a, {b0, b1}};
    emulation::collective(
        [](void** lanes) {
            unsigned a_bits[16][8];  // pairs
            unsigned short b_bits[16][8];
            float a[16][16], b[16][8], sum[16][8];
            for (int lane = 0; lane < 32; lane++) {
                const Mma& from = *static_cast<Mma*>(lanes[lane]);
                const int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) a_bits[g + 8 * (i % 2)][t + 4 * (i / 2)] = from.a[i];
                for (int i = 0; i < 2; i++) {
                    b_bits[2 * t + 8 * i][g] = static_cast<unsigned short>(from.b[i]);
                    b_bits[2 * t + 8 * i + 1][g] = static_cast<unsigned short>(from.b[i] >> 16);
                }
                for (int i = 0; i < 4; i++) sum[g + 8 * (i / 2)][2 * t + i % 2] = from.d[i];
            }
            emulation::widen<HALF>(a[0], reinterpret_cast<const unsigned short*>(a_bits), 256);
            emulation::widen<HALF>(b[0], b_bits[0], 128);
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

template void mma_m16n8k16<f16>(float (&)[4], const unsigned (&)[4], unsigned, unsigned);
template void mma_m16n8k16<bf16>(float (&)[4], const unsigned (&)[4], unsigned, unsigned);

namespace emulation {
struct Matrices {
    unsigned* registers;
    const void* row;
    bool alone;
};
template <bool TRANSPOSED>
void load_matrices(void** lanes) {
    for (int lane = 0; lane < 32; lane++)
        if (static_cast<Matrices*>(lanes[lane])->alone)
            fail("ldmatrix: a lane has waited for its copies, and no barrier came behind that: other lanes read them");
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

void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row, emulation::current().alone};
    emulation::collective(emulation::load_matrices<false>, &mine);
}
void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulation::Matrices mine{r, shared_row, emulation::current().alone};
    emulation::collective(emulation::load_matrices<true>, &mine);
}

namespace emulation {
static size_t chunk_of(const void* shared) { return size_t(static_cast<const char*>(shared) - machine.shared) / 16; }
static void land(const Copy& copy) {
    current().alone = true;
    if (inner.deferred) {
        if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
        else std::memset(copy.shared, 0, 16);
    }
    if (chunk_of(copy.shared) < inner.unfenced.size()) current().landed.push_back(chunk_of(copy.shared));
}
}  // namespace emulation

void cp_async16(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) % 16)
        emulation::fail("cp.async: an address is not aligned to 16 bytes");
    if (emulation::inner.deferred) std::memset(shared, 0xff, 16);
    else if (valid) std::memcpy(shared, global, 16);
    else std::memset(shared, 0, 16);
    emulation::current().copies.push_back({shared, global, valid});
    const size_t chunk = emulation::chunk_of(shared);  // beyond the end in static shared memory, which wgmma does not read
    if (chunk < emulation::inner.unfenced.size()) emulation::inner.unfenced[chunk] = true;
}
void cp_async_commit() { emulation::current().committed.push_back(emulation::current().copies.size()); }
void emulation::wait_for_copies(int pending) {
    Fiber& fiber = current();
    const int ended = int(fiber.committed.size()) - pending;
    if (ended <= 0) return;
    for (const size_t end = fiber.committed[ended - 1]; fiber.arrived < end; fiber.arrived++) land(fiber.copies[fiber.arrived]);
    fiber.committed.erase(fiber.committed.begin(), fiber.committed.begin() + ended);
    if (fiber.arrived < fiber.copies.size()) return;
    for (size_t& end : fiber.committed) end -= fiber.arrived;
    fiber.copies.clear(), fiber.arrived = 0;
}

