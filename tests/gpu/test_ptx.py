"""Every instruction behind ``ptx.cuh`` against NumPy: what the emulation takes for granted, the device has to prove."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation import compiled
from tests.kernel_cases import Array, full, half, needs_compiler, noise

pytestmark = needs_compiler

SOURCE = r"""
#include "ptx.cuh"

extern "C" __global__ void convert(const float* x, T* out, float* back, unsigned* packed, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = from_float<T>(x[i]);
    back[i] = to_float(out[i]);
    packed[i] = pack<T>(x[i], x[(i + 1) % n]);
}

extern "C" __global__ void powers(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = exp2_fast(x[i]);
}

// out = a b^T + c by one warp: a [16, 16], b [8, 16], c and out [16, 8]; fragments are gathered by hand.
extern "C" __global__ void reciprocals(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = reciprocal_fast(x[i]);
}

// out = a b^T + c by one warp: a [16, 16], b [8, 16], c and out [16, 8]; fragments are gathered by hand.
extern "C" __global__ void product(const T* a, const T* b, const float* c, float* out) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    auto two = [](const T* p) { return unsigned(p[0].bits) | unsigned(p[1].bits) << 16; };
    unsigned fa[4] = {two(a + g * 16 + 2 * t), two(a + (g + 8) * 16 + 2 * t), two(a + g * 16 + 2 * t + 8),
                      two(a + (g + 8) * 16 + 2 * t + 8)};
    float d[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
    mma_m16n8k16<T>(d, fa, two(b + g * 16 + 2 * t), two(b + g * 16 + 2 * t + 8));
    out[g * 8 + 2 * t] = d[0];
    out[g * 8 + 2 * t + 1] = d[1];
    out[(g + 8) * 8 + 2 * t] = d[2];
    out[(g + 8) * 8 + 2 * t + 1] = d[3];
}

// Four 8 x 8 matrices through shared memory: out[lane, i] is register i.
extern "C" __global__ void load_matrices(const unsigned short* x, unsigned* plain, unsigned* transposed) {
    __shared__ uint4 rows[32];
    unsigned short* tile = reinterpret_cast<unsigned short*>(rows);
    for (int i = 0; i < 8; i++) tile[threadIdx.x * 8 + i] = x[threadIdx.x * 8 + i];
    __syncthreads();
    unsigned r[4];
    ldmatrix_x4(r, tile + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) plain[threadIdx.x * 4 + i] = r[i];
    ldmatrix_x4_trans(r, tile + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) transposed[threadIdx.x * 4 + i] = r[i];
}

// Two groups of copies; the first is waited for alone, then the second; rows from `valid` on are zeros.
extern "C" __global__ void copy_rows(const uint4* x, uint4* out, int valid) {
    __shared__ uint4 tile[64];
    int i = threadIdx.x;
    cp_async16(tile + i, x + i, i < valid);
    cp_async_commit();
    cp_async16(tile + 32 + i, x + 32 + i, 32 + i < valid);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    out[i] = tile[31 - i];
    cp_async_wait<0>();
    __syncthreads();
    out[32 + i] = tile[63 - i];
}
"""


def run(kind: str, name: str, grid: int, block: int, *args: object) -> None:
    typed = [np.int32(arg) if isinstance(arg, int) else arg for arg in args]
    compiled(SOURCE, {"T": kind}).kernel(name)((grid,), (block,), typed)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_round_to_nearest_even(kind: str) -> None:
    ties = np.array(
        [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.0, 2.0**-24, 0, -0.0], np.float32
    )
    x = np.concatenate([noise((500,), 1), noise((500,), 2, 1e-5), ties])
    out, back, packed = np.zeros(len(x), np.uint16), np.zeros_like(x), np.zeros(len(x), np.uint32)
    run(kind, "convert", -(-len(x) // 128), 128, x, out, back, packed, len(x))
    bits = half(x, kind).view(np.uint16)
    assert np.array_equal(out, bits)
    assert np.array_equal(back, full(half(x, kind)))
    assert np.array_equal(packed, bits.astype(np.uint32) | np.roll(bits, -1).astype(np.uint32) << 16)


def test_powers_of_two() -> None:
    x = np.concatenate([np.linspace(-120, 20, 4001), [0, -np.inf]]).astype(np.float32)
    out = np.zeros_like(x)
    run("f16", "powers", -(-len(x) // 128), 128, x, out, len(x))
    exact = np.exp2(x.astype(np.float64))
    assert out[-1] == 0 and np.isfinite(out).all()
    ulp = np.spacing(exact[:-1].astype(np.float32)).astype(np.float64)
    assert (np.abs(out[:-1] - exact[:-1]) <= 3 * ulp).all()  # documented: 2 ulp, and NumPy's own rounding


def test_reciprocals() -> None:
    x = np.concatenate([np.geomspace(2.0**-120, 2.0**120, 4001), [1, np.inf]]).astype(np.float32)
    out = np.zeros_like(x)
    run("f16", "reciprocals", -(-len(x) // 128), 128, x, out, len(x))
    exact = 1 / x[:-1].astype(np.float64)
    assert out[-1] == 0
    assert (np.abs(out[:-1] - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()  # documented: 1 ulp


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_tensor_core_product(kind: str) -> None:
    a, b, c = half(noise((16, 16), 1), kind), half(noise((8, 16), 2), kind), noise((16, 8), 3)
    out = np.zeros_like(c)
    run(kind, "product", 1, 32, a.view(np.uint16), b.view(np.uint16), c, out)
    exact = full(a).astype(np.float64) @ full(b).astype(np.float64).T + c
    naive = np.zeros_like(c)
    for i in range(16):
        naive += full(a)[:, i : i + 1] * full(b)[:, i]
    unit = np.abs(naive + c - exact).max()
    assert np.abs(out - exact).max() <= 4 * unit  # tensor cores align sums before they add: less exact than float32


def test_matrices_from_shared_memory() -> None:
    x = np.arange(32 * 8, dtype=np.uint16)
    plain, transposed = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    run("f16", "load_matrices", 1, 32, x, plain, transposed)
    matrices = x.reshape(4, 8, 8)

    def fragments(m: Array) -> Array:
        pairs = m.reshape(4, 8, 4, 2).astype(np.uint32)
        return (pairs[..., 0] | pairs[..., 1] << 16).reshape(4, 32).T

    assert np.array_equal(plain, fragments(matrices))
    assert np.array_equal(transposed, fragments(matrices.transpose(0, 2, 1)))


@pytest.mark.parametrize("valid", [64, 40, 7, 0])
def test_asynchronous_copies(valid: int) -> None:
    x = np.arange(64 * 4, dtype=np.uint32).reshape(64, 4) + 1
    out = np.full_like(x, 0xFFFFFFFF)
    run("f16", "copy_rows", 1, 32, x, out, valid)
    expected = np.where(np.arange(64)[:, None] < valid, x, 0).reshape(2, 32, 4)[:, ::-1].reshape(64, 4)
    assert np.array_equal(out, expected)
