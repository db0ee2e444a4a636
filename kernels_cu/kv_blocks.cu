// Blocks of keys and values between the host's layout and a layer's: one launch moves any number of scattered blocks.
//
//   blocks [n] addresses, each of a block [2, Hkv, block, Dh] of T, contiguous, on the device or in mapped pinned memory
//   slots [n] int32: block i lies at rows slots[i] * block of layer [2, Hkv, capacity, Dh]
//   grid (n, 2 * Hkv), block 128: a block of threads moves one head's rows of one block, which are contiguous in both.
//
// blocks_to_layer is the gather into resident or staging slots, layer_to_blocks the scatter out of them.
#include "ptx.cuh"

__device__ __forceinline__ void move(const T* from, T* to, int elements) {
    for (int i = 8 * threadIdx.x; i < elements; i += 8 * blockDim.x)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}
__device__ __forceinline__ T* in_block(const unsigned long long* blocks, int elements) {
    return reinterpret_cast<T*>(blocks[blockIdx.x]) + blockIdx.y * (long long)elements;
}
__device__ __forceinline__ T* in_layer(T* layer, const int* slots, int block, int dh, int capacity) {
    return layer + (blockIdx.y * (long long)capacity + slots[blockIdx.x] * (long long)block) * dh;
}

extern "C" __global__ void __launch_bounds__(128)
blocks_to_layer(const unsigned long long* blocks, const int* slots, T* layer, int block, int dh, int capacity) {
    move(in_block(blocks, block * dh), in_layer(layer, slots, block, dh, capacity), block * dh);
}

extern "C" __global__ void __launch_bounds__(128)
layer_to_blocks(const unsigned long long* blocks, const int* slots, T* layer, int block, int dh, int capacity) {
    move(in_layer(layer, slots, block, dh, capacity), in_block(blocks, block * dh), block * dh);
}
