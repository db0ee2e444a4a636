// Blocks of keys and values from the host's layout into a layer's: one launch moves any number of scattered blocks.
//
//   blocks [n] addresses, each of a block [2, Hkv, block, Dh] of T, contiguous, on the device or in mapped pinned memory
//   slots [n] int32: block i goes to rows slots[i] * block of layer [2, Hkv, capacity, Dh]
//   count [1] or null: how many of the n are moved
//   grid (n, 2 * Hkv), block 128: a block of threads moves one head's rows of one block, which are contiguous in both.
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(128)
blocks_to_layer(const unsigned long long* blocks, const int* slots, T* layer, int block, int dh, int capacity,
                const int* count) {
    if (count && blockIdx.x >= count[0]) return;
    const int elements = block * dh;
    const T* from = reinterpret_cast<const T*>(blocks[blockIdx.x]) + blockIdx.y * (long long)elements;
    T* to = layer + (blockIdx.y * (long long)capacity + slots[blockIdx.x] * (long long)block) * dh;
    for (int i = 8 * threadIdx.x; i < elements; i += 8 * blockDim.x)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}
