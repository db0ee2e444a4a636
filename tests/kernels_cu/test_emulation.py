"""That the emulation finds what it is there to find: kernels broken on purpose, in every mode, and bad launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulation import SOURCES, EmulationError, compiled, compiler, emulated, emulation_mode
from tests.kernel_cases import Array, full, half, needs_compiler, noise

pytestmark = needs_compiler

ROOT = Path(__file__).parents[2]


def attend(code: str, stages: int, **more: object) -> Array:
    """What a source of the prefill kernel makes of a fixed input: three tiles of queries, two heads."""
    kernel = compiled(code, {"T": "f16", "DH": 64, "TILE": 64, "STAGES": stages, **more}).kernel("attention_prefill")
    q, k, v = (half(noise(shape, seed)) for seed, shape in enumerate([(190, 2, 64), (1, 190, 64), (1, 190, 64)]))
    out = np.zeros_like(q)
    sizes = (*(np.int32(n) for n in (190, 190, 2, 1, 128, 190 * 64)), np.uintp(0), np.float32(0))
    kernel((2, 3), (128,), (q, k, v, out, np.uintp(0), *sizes), shared_mem=128 * (64 + 128 * stages))
    return full(out)


def broken(source: str, before: str, after: str, occurrence: int = 0) -> str:
    """The source with one occurrence of ``before`` replaced."""
    parts = (SOURCES / source).read_text().split(before)
    assert len(parts) > occurrence + 1, "the kernel has changed: break it elsewhere"
    return before.join(parts[: occurrence + 1]) + after + before.join(parts[occurrence + 1 :])


PREFILL = "attention_prefill.cu"
ARRIVED = "cp_async_wait<1>();\n        __syncthreads();"
REFILL = "__syncthreads();\n            load_{}(tile + 1);"


@pytest.mark.parametrize(
    ("before", "after", "occurrence", "stages"),
    [
        (ARRIVED, "cp_async_wait<2>(); __syncthreads();", 0, 2),  # waits for too little
        (ARRIVED, "cp_async_wait<2>(); __syncthreads();", 1, 1),
        (REFILL.format("keys"), "load_keys(tile + 1);", 0, 1),
        (REFILL.format("values"), "load_values(tile + 1);", 0, 1),
    ],
)
def test_deferred_copies_show_what_is_read_too_early(before: str, after: str, occurrence: int, stages: int) -> None:
    with emulation_mode(deferred=True):
        assert np.isfinite(attend((SOURCES / PREFILL).read_text(), stages)).all()
        assert np.isnan(attend(broken(PREFILL, before, after, occurrence), stages)).any()


@pytest.mark.parametrize("occurrence", [0, 1])
def test_ldmatrix_reads_what_other_lanes_have_waited_for_behind_a_barrier(occurrence: int) -> None:
    """In prefill a barrier of the block, keys' or values'; in decode that of a warp, whose lanes are in step here."""
    with emulation_mode(deferred=bool(occurrence)):
        with pytest.raises(EmulationError, match="no barrier came behind that"):
            attend(broken(PREFILL, ARRIVED, "cp_async_wait<1>();", occurrence), 2)
        code = broken("attention_decode.cu", "cp_async_wait<1>();\n        __syncwarp();", "cp_async_wait<1>();")
        kernel = compiled(code, {"T": "f16", "DH": 64}).kernel("attention_decode")
        q, k = half(noise((1, 1, 64))), half(noise((1, 32, 64)))
        args = [q, k, k, np.uintp(0), np.array([32], np.int32), np.uintp(0), np.zeros((1, 1, 66), np.float32)]
        sizes = [np.int32(n) for n in (1, 1, 32 * 64, 1)]
        with pytest.raises(EmulationError, match="no barrier came behind that"):
            kernel((1, 1), (128,), [*args, *sizes, np.uintp(0), np.float32(0)], shared_mem=512 * 64)


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("seed", [1, 2])
def test_eager_copies_show_what_is_overwritten_too_early(what: str, seed: int) -> None:
    before = REFILL.format(what)
    with emulation_mode(deferred=False, seed=seed):
        right = attend((SOURCES / PREFILL).read_text(), 1)
        wrong = attend(broken(PREFILL, before, f"load_{what}(tile + 1);"), 1)
    assert np.abs(right - wrong).max() > 0.01


def test_shared_memory_that_a_kernel_declares_is_known() -> None:
    """It is poisoned before each block, and counts towards what may be had without asking. g++ leaves variables of
    templates out of the section that holds it, so kernels must not declare any there."""
    defines = {"TYPE": "Q4_0", "T": "f16", "FROM": "float", "OUT": "float", "STAGES": 3}
    kernel = emulated("gemv.cu", defines).kernel("gemv")
    assert kernel.max_dynamic_shared_size_bytes == (48 << 10) - 4 * (2 * 8 * 16 + 2 * 8)
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void poisoned(int* out) {
        __shared__ int held[32];
        out[threadIdx.x] = held[threadIdx.x];
        __syncwarp();
        held[threadIdx.x] = 7;
    }
    """
    out = np.zeros(32, np.int32)
    for _ in range(2):
        compiled(code).kernel("poisoned")((1,), (32,), (out,))
        assert (out == -1).all()


GEMV = "gemv.cuh"


def one_token(header: str) -> Array:
    """What gemv.cu makes of a fixed input with this text for gemv.cuh: five tiles for two blocks, ten cells for eight
    warps, three stages."""
    code = (SOURCES / "gemv.cu").read_text().replace('#include "gemv.cuh"', header)
    weight, x = half(noise((80, 640), 1)), half(noise((640,), 2))
    out = np.zeros(80, np.float32)
    kernel = compiled(code, {"TYPE": "F16", "T": "f16", "FROM": "f16", "OUT": "float", "STAGES": 3}).kernel("gemv")
    shared = 8 * 3 * 2048 + 64 + 2 * 640
    kernel.max_dynamic_shared_size_bytes = shared
    null = np.uintp(0)
    args = (weight, x, null, np.float32(0), null, null, out, np.int32(80), np.int32(640), np.int32(8))
    kernel((2,), (256,), args, shared_mem=shared)
    return out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),  # waits for too little
        ("__syncwarp();  // the other", "// the other"),  # its own copies have landed, those of other lanes have not
    ],
)
def test_a_ring_without_its_waits(before: str, after: str) -> None:
    right = (SOURCES / GEMV).read_text()
    with emulation_mode(deferred=True):
        assert np.isfinite(one_token(right)).all()
        assert np.isnan(one_token(broken(GEMV, before, after))).any()


def test_a_ring_that_is_filled_too_early() -> None:
    """The next cell goes where the last one was read from: before that, it lands on what is still to be read."""
    early = broken(GEMV, "cp_async_wait<STAGES - 2>();", "fetch(); cp_async_wait<STAGES - 2>();")
    early = early.replace("            fetch();\n            Cell::multiply", "            Cell::multiply")
    ahead = early.replace("for (int i = 0; i < STAGES - 1; i++) fetch();", "for (int i = 0; i < STAGES; i++) fetch();")
    with emulation_mode(deferred=False):
        right = one_token((SOURCES / GEMV).read_text())
        assert np.abs(one_token(ahead) - right).max() > 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_that_are_joined_without_a_barrier(seed: int) -> None:
    before = "        __syncthreads();  // the one of the next tile"
    with emulation_mode(seed=seed):
        right = one_token((SOURCES / GEMV).read_text())
        wrong = one_token(broken(GEMV, before, "        // the one of the next tile"))
    assert not np.array_equal(wrong, right)


def test_the_order_of_warps_shows_a_missing_barrier() -> None:
    """Without a barrier between writing and reading shared memory the result depends on who comes first."""
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void reverse(const int* x, int* out) {
        __shared__ int held[128];
        held[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        out[threadIdx.x] = held[127 - threadIdx.x];
    }
    """
    x, out = np.arange(128, dtype=np.int32), np.empty(128, np.int32)
    for barrier in ("__syncthreads()", "__syncwarp()"):
        kernel = compiled(code, {"BARRIER": barrier}).kernel("reverse")
        results = []
        for seed in range(4):
            with emulation_mode(seed=seed):
                kernel((1,), (128,), (x, out))
            results.append(np.array_equal(out, x[::-1]))
        assert all(results) if "threads" in barrier else not any(results)


def test_the_order_of_lanes_shows_a_missing_warp_barrier() -> None:
    """Lanes that always came in order would hide what a lane reads of those before it."""
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void shift(const int* x, int* out) {
        __shared__ int held[32];
        held[threadIdx.x] = x[threadIdx.x];
        BARRIER;
        out[threadIdx.x] = threadIdx.x ? held[threadIdx.x - 1] : 0;
    }
    """
    x, out = np.arange(1, 33, dtype=np.int32), np.empty(32, np.int32)
    for barrier in ("__syncwarp()", ""):
        kernel = compiled(code, {"BARRIER": barrier}).kernel("shift")
        results = []
        for seed in range(4):
            with emulation_mode(seed=seed):
                kernel((1,), (32,), (x, out))
            results.append(np.array_equal(out, x - 1))
        assert all(results) if barrier else not all(results)


def test_a_misaligned_vector_is_an_error() -> None:
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void copy(const unsigned* x, unsigned* out, int offset) {
        *reinterpret_cast<VECTOR*>(out) = *reinterpret_cast<const VECTOR*>(x + offset);
    }
    """
    x, out = np.arange(8, dtype=np.uint32), np.zeros(8, np.uint32)
    assert x.ctypes.data % 16 == out.ctypes.data % 16 == 0
    for vector, words in (("uint2", 2), ("float2", 2), ("uint4", 4), ("float4", 4)):
        kernel = compiled(code, {"VECTOR": vector, "EMULATION_ALIGNMENT": 1}).kernel("copy")
        kernel((1,), (1,), (x, out, np.int32(words)))
        assert out[:words].tolist() == x[words : 2 * words].tolist()
        with pytest.raises(EmulationError, match="misaligned address"):
            kernel((1,), (1,), (x, out, np.int32(1)))


def test_arithmetic_is_that_of_cupys_options() -> None:
    """-ftz=true, for operands and results; -fmad=true. NumPy, around it, goes on with subnormal numbers."""
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void compute(const float* x, float* out) {
        out[0] = x[0] * x[1];
        out[1] = x[2] * x[3];
        out[2] = x[4] * x[4] - x[5];
        out[3] = exp2_fast(x[6]);
    }
    """
    almost = np.float32(1 + 2**-12)
    x = np.array([2.0**-100, 2.0**-30, 2.0**-140, 2.0**100, almost, almost * almost, -127], np.float32)
    out = np.ones(4, np.float32)
    compiled(code).kernel("compute")((1,), (1,), (x, out))
    assert x[0] * x[1] > 0 and x[2] * x[3] > 0
    assert out[[0, 1, 3]].tolist() == [0, 0, 0]
    fused = "fma" in Path("/proc/cpuinfo").read_text().split()
    assert out[2] == (float(almost) ** 2 - float(x[5]) if fused else 0)


def test_fibers_without_our_assembly() -> None:
    """The way of other processors, ucontext, gives the same bits."""
    code = (SOURCES / PREFILL).read_text()
    assert np.array_equal(attend(code, 1, EMULATION_UCONTEXT=1), attend(code, 1))


def test_divergence_is_an_error_not_a_hang() -> None:
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void diverge(int* out) {
        if (threadIdx.x < LIMIT) out[threadIdx.x] = __shfl_xor_sync(FULL_WARP, int(threadIdx.x), 1);
        else OTHER;
    }
    """
    out = np.zeros(64, np.int32)
    compiled(code, {"LIMIT": 32, "OTHER": "out[threadIdx.x] = 1"}).kernel("diverge")((1,), (64,), (out,))
    assert out.tolist() == [i ^ 1 for i in range(32)] + [1] * 32
    for other, error in (("out[0] = 1", "deadlock"), ("__syncthreads()", "deadlock"), ("__syncwarp()", "different")):
        kernel = compiled(code, {"LIMIT": 16, "OTHER": other}).kernel("diverge")
        with pytest.raises(EmulationError, match=error):
            kernel((1,), (64,), (out,))


def test_launches_are_held_against_the_signature() -> None:
    kernel = emulated("rmsnorm.cu", {"T": "f16"}).kernel("rmsnorm")
    x, out = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float16)
    args = (x, x[0], out, np.int32(8), np.float32(1e-5))
    kernel((2,), (256,), args)
    for number, bad in ((0, np.float32(1)), (3, np.int64(8)), (3, 8), (4, np.float64(1e-5)), (2, None)):
        with pytest.raises(EmulationError, match=f"argument {number}"):
            kernel((2,), (256,), [*args[:number], bad, *args[number + 1 :]])
    with pytest.raises(EmulationError, match="4 arguments"):
        kernel((2,), (256,), args[:4])
    with pytest.raises(EmulationError, match="cannot launch"):
        kernel((2,), (2048,), args)
    with pytest.raises(EmulationError, match="dynamic shared memory"):
        kernel((2,), (256,), args, shared_mem=50000)
    with pytest.raises(EmulationError, match="no kernel 'norm'"):
        emulated("rmsnorm.cu", {"T": "f16"}).kernel("norm")


def test_sixteen_bit_conversions_are_numpys() -> None:
    """The twins of the conversions, over every half and around every rounding."""
    code = """
    #include "ptx.cuh"
    extern "C" __global__ void convert(const T* in, float* out, const float* in2, T* out2, int count, int count2) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = to_float(in[i]);
        for (int i = threadIdx.x; i < count2; i += blockDim.x) out2[i] = from_float<T>(in2[i]);
    }
    """
    every = np.arange(65536, dtype=np.uint16)
    edges = (
        np.arange(0, 2**32, 2**13, dtype=np.uint64)[:, None] + np.array([0, 1, 2**12, 2**13 - 1], np.uint64)
    ) % 2**32
    floats = edges.astype(np.uint32).reshape(-1).view(np.float32)
    with np.errstate(all="ignore"):
        for kind, halves in (("f16", every.view(np.float16)), ("bf16", every)):
            out, narrow = np.empty(65536, np.float32), np.empty(floats.shape, np.uint16)
            sizes = (np.int32(65536), np.int32(floats.size))
            compiled(code, {"T": kind}).kernel("convert")((1,), (32,), (halves, out, floats, narrow, *sizes))
            assert np.array_equal(out, full(halves), equal_nan=True)
            expected, numbers = half(floats, kind).view(np.uint16), ~np.isnan(floats)
            assert np.array_equal(narrow[numbers], expected[numbers])
            assert np.isnan(full(narrow.view(halves.dtype))[~numbers]).all()


def test_rows_in_the_same_banks_are_refused() -> None:
    """Without the swizzle ldmatrix takes eight times as long: nothing is wrong but the speed."""
    header = (SOURCES / "attention.cuh").read_text()
    assert header.count(" ^ (row & 7)") == 1 and header.count(" ^ lane % 8") == 2
    header = header.replace(" ^ (row & 7)", "").replace(" ^ lane % 8", "")
    code = (SOURCES / PREFILL).read_text().replace('#include "attention.cuh"', header)
    with pytest.raises(EmulationError, match="same banks"):
        attend(code, 1)


def asan_environment() -> dict[str, str]:
    gxx = compiler()
    assert gxx is not None
    library = subprocess.run([gxx, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("AddressSanitizer's library is not installed with g++")
    options = "detect_leaks=0:detect_stack_use_after_return=0:quarantine_size_mb=16"
    return {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": options, "SLIMRT_EMULATION_ASAN": "1"}


OVERRUN = """
import numpy as np
from tests.emulation import compiled
code = '#line 1 "rmsnorm.cu"\\n' + open("kernels_cu/rmsnorm.cu").read().replace(
    "i < width; i += 4 * blockDim.x) {\\n        const", "i <= width; i += 4 * blockDim.x) {\\n        const")
x, out = np.zeros((1, 512), np.float32), np.zeros((1, 512), np.float16)
compiled(code, {"T": "f16"}).kernel("rmsnorm")((1,), (256,), (x, x, out, np.int32(512), np.float32(1)))
"""


def test_address_sanitizer_names_the_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OVERRUN], cwd=ROOT, env=asan_environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    found = re.search(r"rmsnorm\.cu:(\d+)", done.stderr)
    assert found is not None and "+ i)" in (SOURCES / "rmsnorm.cu").read_text().splitlines()[int(found[1]) - 1]


# What F16, Q4_0 and Q6_K stand for where not all are asked for: the same kernels around other blocks of bytes.
ALIKE = ("Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "bf16")


def test_kernels_under_address_sanitizer() -> None:
    """No kernel reads or writes outside its arrays, or at an odd address, at any of the tests' ragged sizes. Those of
    types that are ``ALIKE`` only where ``SLIMRT_ALL_KERNELS`` is set: most of the time is the compiler's."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("test_kernels_*.py")), folder / "test_attention_wgmma.py"]
    assert len(files) > 5
    few = f"eager-1 and not ({' or '.join(ALIKE)}) and (windows or not wgmma)"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-k",
        "eager-1" if os.environ.get("SLIMRT_ALL_KERNELS") else few,
        *(str(file.relative_to(ROOT)) for file in files),
    ]
    done = subprocess.run(command, cwd=ROOT, env=asan_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
