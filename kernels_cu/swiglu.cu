// The gate of the feed-forward: out = silu(gate) * up, or with GELU gelu(gate) * up in its tanh form.
//
//   gate_up [T, 2 F] of T, gate first; out [T, F] of T
//   grid (T, ceil(F / 2048)), block 256: a thread computes 8 values from two vectors of 16 bytes.
#include "ptx.cuh"

__device__ __forceinline__ float gated(unsigned short gate, unsigned short up) {
    const float g = to_float(T{gate});
#ifdef GELU
    const float t = 1.5957691216057308f * (g + 0.044715f * g * g * g);  // gelu(g) = g sigmoid(t)
#else
    const float t = g;
#endif
    return g / (1.0f + exp2_fast(-1.4426950408889634f * t)) * to_float(T{up});  // exp(-g) = infinity gives the limit, 0
}

extern "C" __global__ void __launch_bounds__(256)
swiglu(const T* gate_up, T* out, int width) {
    const int i = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (i >= width) return;
    const T* gate = gate_up + blockIdx.x * 2ll * width + i;
    const uint4 g = *reinterpret_cast<const uint4*>(gate), u = *reinterpret_cast<const uint4*>(gate + width);
    const unsigned gates[4] = {g.x, g.y, g.z, g.w}, ups[4] = {u.x, u.y, u.z, u.w};
    unsigned words[4];
    for (int j = 0; j < 4; j++)
        words[j] = pack<T>(gated(gates[j] & 0xffff, ups[j] & 0xffff), gated(gates[j] >> 16, ups[j] >> 16));
    *reinterpret_cast<uint4*>(out + blockIdx.x * (long long)width + i) = make_uint4(words[0], words[1], words[2], words[3]);
}
