// What is done to 16-bit rows by themselves: conversion from float32, and a bias.
//
//   narrow: out [T, width] of T = x [T, width] float32, rounded to nearest even
//   shift: x [T, width] of T += bias [width] float32, in place; the sum is float32, rounded once
//   grid (T, ceil(width / 2048)), block 256: a thread has 8 numbers. width is a multiple of 8.
#include "ptx.cuh"

__device__ __forceinline__ void read(float (&to)[8], const float* from) {
    for (int i = 0; i < 8; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + i);
        to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
}
__device__ __forceinline__ void read(float (&to)[8], const T* from) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 8; i++) to[i] = to_float(T{static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))});
}
__device__ __forceinline__ void write(T* to, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

__device__ __forceinline__ int column() { return 8 * (blockIdx.y * blockDim.x + threadIdx.x); }

extern "C" __global__ void __launch_bounds__(256)
narrow(const float* x, T* out, int width) {
    if (column() >= width) return;
    const long long at = blockIdx.x * (long long)width + column();
    float v[8];
    read(v, x + at);
    write(out + at, v);
}

extern "C" __global__ void __launch_bounds__(256)
shift(T* x, const float* bias, int width) {
    if (column() >= width) return;
    const long long at = blockIdx.x * (long long)width + column();
    float v[8], b[8];
    read(v, x + at);
    read(b, bias + column());
    for (int i = 0; i < 8; i++) v[i] += b[i];
    write(x + at, v);
}
