"""The wrappers' checks: what a RawKernel would misread is refused in one line, whoever calls. And memory on streams."""

from __future__ import annotations

import gc
import itertools
import types
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from slimrt.bench.synthetic import random_tensor
from slimrt.errors import DeviceError
from slimrt.ops.cuda.cupy_ops import CupyOps
from slimrt.ops.cuda.device import probe
from slimrt.ops.cuda.gemv import shared_bytes, stages
from slimrt.ops.cuda.memory import PinnedSlabs
from slimrt.ops.cuda.modules import Kernels, source_text
from slimrt.ops.cuda.prefill import prefill_kernel
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize
from tests import emulation
from tests.fake_cupy import FakeCupy, RawModule
from tests.gpu import test_ptx
from tests.gpu.on_device import pasted
from tests.half_ops import HalfOps, half
from tests.kernels_cu.test_kernel_compile import compile_source, toolchain

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason="running CUDA sources on the CPU needs g++")
SLACK = 3  # both round to float16 in the same places; the order of sums differs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return FakeCupy(monkeypatch)


def elsewhere(x: Any) -> Any:
    """``x`` as if it lay on a second GPU."""
    x.device = types.SimpleNamespace(id=1)
    return x


def bad_calls(ops: CupyOps) -> dict[str, tuple[Any, str]]:
    half, single = ops.empty, lambda *shape: ops.empty(shape, np.float32)
    weight = ops.weight(random_tensor("w", "Q8_0", (64, 64), np.random.default_rng(0)))
    x, gain = single(4, 64), single(64)
    k, odd, turned = half((2, 32, 64)), half((2, 4, 80)), half((2, 64, 32)).transpose(0, 2, 1)
    return {
        "rmsnorm on the host": (lambda: ops.rmsnorm(np.zeros((4, 64), np.float32), gain, 1e-5), "lies in host memory"),
        "rmsnorm of float16": (lambda: ops.rmsnorm(half((4, 64)), gain, 1e-5), "is float16, must be float32"),
        "rmsnorm of columns": (lambda: ops.rmsnorm(single(64, 4).T, gain, 1e-5), "is not C-contiguous"),
        "rmsnorm of another width": (lambda: ops.rmsnorm(single(4, 32), gain, 1e-5), r"shape \(4, 32\), must have"),
        "rmsnorm elsewhere": (lambda: ops.rmsnorm(elsewhere(single(4, 64)), gain, 1e-5), "lies on GPU 1"),
        "linear of float32": (lambda: ops.linear(x, weight), "is float32, must be float16"),
        "linear of another width": (lambda: ops.linear(half((4, 32)), weight), r"must have \(None, 64\)"),
        "add_linear to another shape": (lambda: ops.add_linear(single(3, 64), half((4, 64)), weight), "shape"),
        "swiglu of every second row": (lambda: ops.swiglu(half((8, 64))[::2]), "is not C-contiguous"),
        "rope of float16 angles": (lambda: ops.rope(half((4, 2, 64)), half((4, 32)), half((4, 32))), "float32"),
        "attend with odd heads": (lambda: ops.attend(half((4, 2, 80)), odd, odd), "heads of 80"),
        "attend with fewer keys": (lambda: ops.attend(half((64, 2, 64)), k, k), "64 rows of 32"),
        "attend with scattered keys": (
            lambda: ops.attend(half((4, 2, 64)), turned, turned),
            "not contiguous",
        ),
        "attend with every second key": (lambda: ops.attend(half((4, 2, 64)), k[:, ::2], k[:, ::2]), "not contiguous"),
        "attend with values laid out otherwise": (lambda: ops.attend(half((4, 2, 64)), k, half((2, 40, 64))[:, :32]),
                                                  "they must have one layout"),
        "take on float16": (lambda: ops.take(half((4, 64)), np.arange(2)), "is float16"),
        "scores of float32 keys": (lambda: ops.score_blocks("token_max", half((4, 2, 64)), single(2, 32, 64), 16, 8),
                                   "must be float16"),
        "a width that kernels do not take": (
            lambda: ops.weight(TensorInfo("odd", (4, 20), Type.F16, np.zeros((4, 20), np.float16))),
            "'odd' has rows of 20; the GPU's kernels take multiples of 32",
        ),
        "a weight beyond float16": (
            lambda: ops.weight(TensorInfo("big", (32, 32), Type.F32, np.full((32, 32), 1e6, np.float32))),
            "'big' .F32. exceeds what float16 holds",
        ),
        "a copy between shapes": (lambda: ops.wait(ops.copy([(half((4,)), np.zeros(5, np.float16))], after=ops.mark())),
                                  "the shapes must be equal"),
    }  # fmt: skip


@needs_compiler
def test_what_a_kernel_would_misread_is_refused(fake: FakeCupy) -> None:
    ops = CupyOps()
    for name, (call, said) in bad_calls(ops).items():
        launched = len(fake.launches)
        with pytest.raises(DeviceError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value), name
        assert len(fake.launches) == launched or name.startswith("attend"), name


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_residual_beyond_float16(fake: FakeCupy, rows: int) -> None:
    """What is added to the stream is never rounded to float16, which ends at 65504."""
    ops, random = CupyOps(), np.random.default_rng(rows)
    values = random.standard_normal((48, 64)).astype(np.float16)
    weight = ops.unpacked(ops.weight(TensorInfo("w", (48, 64), Type.F16, values)))
    x = random.standard_normal((rows, 48), np.float32)
    y = (1e4 * random.standard_normal((rows, 64))).astype(np.float16)
    exact = x + y.astype(np.float64) @ values.astype(np.float64).T
    assert np.abs(exact).max() > 65504
    held = ops.upload(x)
    fresh = ops.to_host(ops.add_linear(held, ops.upload(y), weight))
    assert np.array_equal(ops.to_host(held), x)
    assert ops.add_linear(held, ops.upload(y), weight, out=held) is held
    naive = np.abs((x + y.astype(np.float32) @ values.astype(np.float32).T) - exact).max()
    for found in (fresh, ops.to_host(held)):
        assert np.abs(found - exact).max() <= 4 * naive + np.abs(exact).max() * 2.0**-22


@needs_compiler
def test_shared_memory_that_only_just_needs_permission(fake: FakeCupy) -> None:
    """48 KiB are for what a kernel declares and what it is given, together: rows of 5632 lie between the two."""
    ops, random = CupyOps(), np.random.default_rng(3)
    assert (48 << 10) - 1088 < shared_bytes("Q4_0", 5632, stages("Q4_0", 5632, 227 << 10)[0]) < 48 << 10
    tensor = random_tensor("down", "Q4_0", (16, 5632), random)
    x = random.standard_normal((1, 5632)).astype(np.float16)
    found = ops.to_host(ops.linear(ops.upload(x), ops.weight(tensor)))
    exact = x.astype(np.float64) @ dequantize(tensor).T.astype(np.float64)
    naive = half(x.astype(np.float32) @ half(dequantize(tensor)).T)
    assert np.abs(found - exact).max() <= SLACK * np.abs(naive - exact).max()


@needs_compiler
def test_gate_and_up_of_different_types(fake: FakeCupy) -> None:
    """They do not meet in a tile: two products and the gate, which mean the same."""
    ops, random = CupyOps(), np.random.default_rng(2)
    parts = [random_tensor(name, kind, (96, 64), random) for name, kind in (("gate", "Q4_0"), ("up", "Q8_0"))]
    x, gain = ops.upload(random.standard_normal((1, 64), np.float32)), ops.upload(np.ones(64, np.float32))
    mixed = ops.weight(*parts, half=96)
    assert [part.half for part in mixed.parts] == [8, 8]
    gate, up, naive = *(dequantize(part).T for part in parts), HalfOps()
    row = ops.to_host(x).astype(np.float64)
    row /= np.sqrt((row * row).mean() + 1e-5)
    exact = row @ gate / (1 + np.exp(-(row @ gate))) * (row @ up)
    plain = naive.swiglu(
        naive.linear(naive.rmsnorm(ops.to_host(x), np.ones(64, np.float32), 1e-5), naive.weight(*parts))
    )
    unit = np.abs(plain - exact).max()
    for found in (
        ops.swiglu(ops.linear(ops.rmsnorm(x, gain, 1e-5), mixed)),
        ops.normed_gated(x, gain, 1e-5, mixed, None),
    ):
        assert np.abs(ops.to_host(found) - exact).max() <= SLACK * unit
    with pytest.raises(DeviceError, match="rows of 200000; this GPU's shared memory is too small"):
        stages("F16", 200000, 100 << 10)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_parts_of_different_types(fake: FakeCupy, rows: int) -> None:
    """Each part of a weight finds its own columns of bias, residual and result."""
    ops, naive, random = CupyOps(), HalfOps(), np.random.default_rng(rows)
    parts = [random_tensor(kind, kind, (n, 64), random) for kind, n in (("Q4_0", 32), ("Q8_0", 48), ("F16", 16))]
    weight, plain = ops.weight(*parts), naive.weight(*parts)
    x = random.standard_normal((rows, 64)).astype(np.float16)
    bias, stream = (random.standard_normal(shape, np.float32) for shape in (96, (rows, 96)))
    dense = np.concatenate([dequantize(part) for part in parts]).astype(np.float64)
    exact = x.astype(np.float64) @ dense.T + bias
    there, shift = ops.upload(x), ops.upload(bias)
    for name, found, half_found in (
        ("linear", ops.linear(there, weight, shift), naive.linear(x.astype(np.float32), plain, bias)),
        ("wide_linear", ops.wide_linear(there, weight, shift), naive.linear(x.astype(np.float32), plain, bias)),
    ):
        assert np.abs(ops.to_host(found) - exact).max() <= SLACK * np.abs(half_found - exact).max(), name
    added = ops.to_host(ops.add_linear(ops.upload(stream), there, weight, shift))
    assert np.abs(added - exact - stream).max() <= SLACK * np.abs(half_found - exact).max()


@needs_compiler
def test_one_query_in_a_window(fake: FakeCupy) -> None:
    """Layer by layer: the number of keys, and of the first that is seen, lie in memory, however many there are."""
    ops, random = CupyOps(), np.random.default_rng(1)
    for number in (0, 4095, 4096, 9000):
        assert ops.to_host(ops._count(number)).tolist() == [number]
    for rows in ([0, 3], [1, 3], [1, 3]):
        assert ops.to_host(ops._starts(np.array(rows))).tolist() == rows
    q, k, v = (random.standard_normal(shape).astype(np.float16) for shape in ((1, 2, 64), (1, 200, 64), (1, 200, 64)))
    first = np.array([150])
    found = ops.to_host(ops.attend(ops.upload(q), ops.upload(k), ops.upload(v), first=first))
    exact, naive = (
        backend.attend(*(x.astype(np.float32) for x in (q, k, v)), first=first) for backend in (NumpyOps(), HalfOps())
    )
    assert np.abs(found - exact).max() <= SLACK * np.abs(naive - exact).max()


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, fake: FakeCupy) -> None:
    kernels = Kernels(fake.module)

    def refuse(_: RawModule) -> None:
        raise RuntimeError("nvrtc: error\nrmsnorm.cu(3): error: expected a ';'\n1 error detected")

    monkeypatch.setattr(RawModule, "compile", refuse)
    with pytest.raises(DeviceError, match=r"rmsnorm of rmsnorm.cu \(-DT=f16\) does not compile: .*error") as caught:
        kernels.get("rmsnorm", "rmsnorm", T="f16")
    assert "\n" not in str(caught.value)


def test_sources_are_whole() -> None:
    """No include is left, so that CuPy's cache, which sees this text only, can never be stale."""
    text = source_text("attention_prefill.cu")
    assert '#include "' not in text and "#pragma once" not in text
    assert text.count("struct f16 {") == 1 and '#line 1 "ptx.cuh"' in text


def test_probes_of_instructions_compile() -> None:
    """What a card is asked first; the kernels themselves are compiled by tests/kernels_cu."""
    tools = toolchain()
    if isinstance(tools, str):
        pytest.skip(tools)
    assert compile_source(tools[0], pasted(test_ptx.SOURCE), ["-arch=sm_80", "-std=c++17", "-DT=f16"])


@needs_compiler
def test_prompts_attend_by_wgmma_on_hopper(fake: FakeCupy) -> None:
    """The same result as by mma.sync, compiled and loaded as a binary for sm_90a."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in ((70, 4, 64), (2, 200, 64), (2, 200, 64)))
    results = []
    for ops in (CupyOps(wgmma=False), CupyOps()):
        out = ops.attend(ops.upload(q), ops.upload(k), ops.upload(v), reach=[0, 64])
        results.append(ops.to_host(out).astype(np.float32))
    assert fake.launches[-2:] == ["attention_prefill", "attention_wgmma"]
    exact = NumpyOps().attend(*(x.astype(np.float32) for x in (q, k, v)), reach=[0, 64])
    plain, hopper = (np.abs(result - exact).max() for result in results)
    assert hopper <= 2 * plain


def test_other_generations_keep_mma_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (8, 9), (10, 0)):
        FakeCupy(monkeypatch, capability=capability)
        assert prefill_kernel(probe()).source == "attention_prefill"


@needs_compiler
def test_a_cubin_that_does_not_compile_is_one_line(fake: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: str, defines: object) -> None:
        raise emulation.EmulationError("kernel.cu(7): error: no such instruction")

    monkeypatch.setattr(emulation, "compiled", refuse)
    with pytest.raises(DeviceError, match=r"attention_wgmma\.cu .* does not compile: kernel\.cu\(7\)"):
        Kernels(fake.module).get("attention_wgmma", "attention_wgmma", T="f16", DH=64, STAGES=2)


@needs_compiler
def test_shared_memory_is_asked_for_once(fake: FakeCupy) -> None:
    ops = CupyOps()
    q, k = ops.copied(ops.upload(np.ones((20, 2, 128), np.float16))), ops.upload(np.ones((1, 20, 128), np.float16))
    out = ops.attend(q, k, k)  # 96 KB of dynamic shared memory: the stand-in refuses it unless it was allowed
    # A mean of ones: weights and results are rounded to float16, as in HalfOps.
    assert np.abs(ops.to_host(out).astype(np.float32) - 1).max() <= 2 * np.finfo(np.float16).eps
    assert ops.attend(q, k, k).shape == (20, 2, 128)


@pytest.mark.parametrize("late", [False, True])
def test_copies_in_every_layout(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    FakeCupy(monkeypatch, **({"copies": "late", "compute": "late"} if late else {}))  # type: ignore[arg-type]
    ops = CupyOps()
    values = np.arange(2 * 6 * 8, dtype=np.float16).reshape(2, 6, 8)
    there, here = ops.empty((2, 6, 8)), ops.pinned((2, 6, 8))
    ops.wait(ops.copy([(there, values)], after=ops.mark()))
    back = ops.copy([(here, there)], after=ops.mark())
    strided = ops.pinned((6, 2, 4))
    ops.wait(ops.copy([(strided, there.transpose(1, 0, 2)[:, :, 4:])], after=back))
    part = ops.empty((2, 6, 4))
    ops.wait(ops.copy([(part, here[:, :, 4:])], after=back))  # packed on the host, once that is filled
    turned = ops.empty((6, 2, 8))
    ops.wait(ops.copy([(turned.transpose(1, 0, 2), values.astype(np.float32))], after=ops.mark()))  # converted
    ops.finish()
    assert np.array_equal(here, values) and np.array_equal(strided, values.transpose(1, 0, 2)[:, :, 4:])
    assert np.array_equal(ops.to_host(turned), values.transpose(1, 0, 2))
    assert np.array_equal(ops.to_host(part), values[:, :, 4:])


def test_results_are_read_behind_compute_whatever_stream_the_caller_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCupy(monkeypatch, copies="late", compute="late")
    ops, elsewhere = CupyOps(), fake.module.cuda.Stream(non_blocking=True)
    x = ops.upload(np.ones(4, np.float32))
    with ops.computing():
        x[...] = ops.upload(np.full(4, 2, np.float32))
    with elsewhere:
        assert np.array_equal(ops.to_host(x), np.full(4, 2))
        with ops.computing():
            x[...] = ops.upload(np.full(4, 3, np.float32))
        assert np.array_equal(ops.to_host(x), np.full(4, 3))


def test_a_failed_copy_leaves_out_what_comes_after_it(fake: FakeCupy) -> None:
    ops = CupyOps()
    x = ops.upload(np.ones(4, np.float16))
    fake.copy_count, fake.fail_at = 0, 1
    first = ops.copy([(x, np.zeros(4, np.float16))], after=ops.mark())
    fake.fail_at = None
    second = ops.copy([(x, np.full(4, 2, np.float16))], after=first)
    assert first.done() and second.done()
    for fence in (first, second):
        with pytest.raises(DeviceError, match="cudaErrorInvalidValue"):
            ops.wait(fence)
    assert np.array_equal(ops.to_host(x), np.ones(4))
    ops.wait(ops.copy([(x, np.full(4, 3, np.float16))], after=ops.mark()))
    assert np.array_equal(ops.to_host(x), np.full(4, 3))


def test_pinned_slabs_are_exact_and_used_again(fake: FakeCupy) -> None:
    slabs = PinnedSlabs(fake.module)
    slabs.reserve(96, 3)
    assert (fake.pinned_calls, fake.pinned_bytes) == (1, 288)
    held = [slabs.take((6, 8), np.float16) for _ in range(3)]
    assert not any(np.may_share_memory(a, b) for a, b in itertools.pairwise(held))
    address, view = held[0].ctypes.data, held[0][2:]
    del held[0]
    gc.collect()
    assert slabs.take((6, 8), np.float16).ctypes.data != address  # a view is left: the slab is not free
    assert fake.pinned_calls == 2
    del view
    gc.collect()
    assert slabs.take((48,), np.float16).ctypes.data == address
    before = fake.pinned_bytes
    slabs.reserve(96, 3)
    assert fake.pinned_bytes == before + 96  # two lie ready
    assert slabs.take((0, 4), np.float16).shape == (0, 4)


def test_arrays_of_ended_copies_are_let_go(fake: FakeCupy) -> None:
    ops = CupyOps()
    x = ops.empty((1 << 16,))
    ops.wait(ops.copy([(x, np.zeros(1 << 16, np.float16))], after=ops.mark()))
    before = fake.used
    del x
    ops.empty((1,))
    gc.collect()
    assert fake.used < before


def test_arrays_of_copies_under_way_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lets go of one gives its memory to the next allocation only when the copy has ended."""
    FakeCupy(monkeypatch, copies="late", compute="late")
    ops, values = CupyOps(), np.arange(8, dtype=np.float16)
    source, here = ops.upload(values), ops.pinned((8,))
    fence = ops.copy([(here, source)], after=ops.mark())
    del source
    gc.collect()
    ops.copied(ops.upload(values))
    mark = ops.mark()
    assert not fence.done() and not mark.done()
    ops.finish()
    assert fence.done() and mark.done() and np.array_equal(here, values)


@needs_compiler
@pytest.mark.parametrize("copies", ["early", "late"])
def test_blocks_come_when_their_slots_are_free_and_are_held(monkeypatch: pytest.MonkeyPatch, copies: str) -> None:
    FakeCupy(monkeypatch, copies=copies, compute="late")
    ops = CupyOps()
    block = ops.pinned((2, 1, 16, 64))
    block[...] = 1
    layer = ops.upload(np.zeros((2, 1, 32, 64), np.float16))
    before = ops.copied(layer)  # has yet to read the slot
    fence = ops.fetch_blocks(layer, [(1, block)], ops.mark())
    del block
    gc.collect()
    ops.pinned((2, 1, 16, 64))[...] = 5
    ops.wait(fence)
    ops.finish()
    assert not ops.to_host(before).any()
    assert (ops.to_host(layer)[:, :, 16:] == 1).all() and not ops.to_host(layer)[:, :, :16].any()


def test_a_graph_that_reads_what_it_has_not_written_shows(fake: FakeCupy) -> None:
    """Of the stand-in: what a launch or something dead left in the graph's memory must not serve the next one."""
    ops = CupyOps()
    source, early, late = (fake.module.asarray(np.ones(4, np.float32)) for _ in range(3))

    def task() -> Any:
        kept, dead = ops.empty((4,), np.float32), ops.empty((4,), np.float32)
        early[:] = kept  # of the launch before
        kept[:] = source
        dead[:] = source
        alias = dead._a
        del dead
        fake.submit(lambda: np.copyto(late._a, alias))
        return kept

    captured = ops.capture(task)
    for _ in range(2):
        with ops.computing():
            kept = captured.launch()
            ops.mark().synchronize()
        assert (ops.to_host(kept) == 1).all()
        assert np.isnan(ops.to_host(early)).all() and np.isnan(ops.to_host(late)).all()
