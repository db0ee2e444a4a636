"""The fast backend's prefill against NumPy's, at ragged sizes, as each of the processors that it has code for.

The unit of every tolerance is the error of a naive computation in the precision of the kernels: factors rounded to
bfloat16 (where the processor has no bfloat16 products those with packed weights to int16, the others not at all), sums
in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from slimrt.ops.numpy.numpy_ops import NumpyOps, Weight
from slimrt.prune.reach import first_row
from slimrt.weights.gguf import TensorInfo

pytest.importorskip("numba")

from slimrt.ops.fast.dots import FORMATS
from slimrt.ops.fast.fast_ops import FastOps
from slimrt.ops.fast.features import Features, detect
from slimrt.ops.fast.products import packed_shape, shape_of
from tests.fast_cases import packed_rows
from tests.rounded_ops import int16

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

SLACK = 4
SIZES = [  # H, Hkv, Dh, D, F: the default model's, a tiny one, widths that fill no panel
    (9, 3, 64, 576, 1536),
    (4, 2, 16, 64, 96),
    (4, 1, 80, 320, 200),
    (2, 1, 96, 96, 72),
    (2, 2, 128, 128, 64),
    (3, 1, 10, 30, 17),
]
Array = np.ndarray


def processors() -> list[Features]:
    """This processor and lesser ones: every set of features that has products of its own."""
    own = detect()
    return list(dict.fromkeys([own, own.without("amx"), own.without("bf16"), own.without("avx512")]))


@pytest.fixture(scope="module", params=processors(), ids=lambda features: features.key)
def ops(request: pytest.FixtureRequest) -> FastOps:
    return FastOps(2, features=request.param)


def bfloat16(x: Array) -> Array:
    """Rounded to nearest even, held as ``x`` is."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32).astype(x.dtype)


def rounding(ops: FastOps) -> Callable[[Array], Array]:
    """What the processor does to factors."""
    return bfloat16 if shape_of(ops.features).bf16 else lambda x: x


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix(seed: int, rows: int, columns: int) -> TensorInfo:
    values = random(seed, rows, columns) / np.float32(np.sqrt(columns))
    return TensorInfo("w", (rows, columns), GGMLQuantizationType.F32, values)


class Naive(NumpyOps):
    """NumPy in ``dtype``, every factor of a product rounded: what the kernels' precision makes of a layer."""

    def __init__(self, rounded: Callable[[Array], Array], dtype: type) -> None:
        super().__init__(1)
        self.rounded, self.dtype = rounded, dtype

    def weight(self, *parts: TensorInfo) -> Weight:
        return Weight(parts, np.concatenate([part.data for part in parts]).astype(self.dtype))

    def linear(self, x: Array, weight: Weight, bias: Array | None = None, out: Array | None = None) -> Array:
        assert weight.dense is not None
        y = self.rounded(x) @ self.rounded(weight.dense).T
        return y if bias is None else y + bias

    def empty(self, shape: tuple[int, ...], dtype: type = np.float32) -> Array:
        return np.empty(shape, self.dtype)


def held(ours: Array, naive: Array, truth: Array) -> None:
    """``ours`` errs at most SLACK times as much as ``naive`` does, at the worst element and on the whole."""
    ours, naive = ours.astype(np.float64), naive.astype(np.float64)
    unit = max(np.abs(naive - truth).max(), np.finfo(np.float32).eps * np.abs(truth).max())
    assert np.abs(ours - truth).max() <= SLACK * unit
    root = max(np.sqrt(np.square(naive - truth).mean()), np.finfo(np.float32).eps * np.abs(truth).max() / SLACK)
    assert np.sqrt(np.square(ours - truth).mean()) <= SLACK * root


@pytest.mark.parametrize("tokens", [2, 16, 37, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer(ops: FastOps, sizes: tuple[int, ...], tokens: int) -> None:
    heads, kv_heads, width, d, f = sizes
    exact, rounded = Naive(lambda x: x, np.float64), Naive(rounding(ops), np.float32)
    x, gain = random(0, tokens, d), random(1, d)
    half = width // 2 - (1 if width == 10 else 0)  # a rotation that leaves some dimensions alone
    angles = random(2, tokens, half)
    cos, sin = np.cos(angles), np.sin(angles)
    kinds = (heads, kv_heads, width)
    parts = [matrix(3 + i, n * width, d) for i, n in enumerate((heads, kv_heads, kv_heads))]
    joint_bias = random(6, (heads + 2 * kv_heads) * width) if width != 64 else None

    def qkv(backend: NumpyOps, x: Array) -> tuple[Array, ...]:
        weight = backend.unpacked(backend.weight(*parts)) if backend is ops else backend.weight(*parts)
        return backend.qkv(x, gain, 1e-5, weight, joint_bias, cos, sin, kinds)

    for number, (ours, naive, truth) in enumerate(
        zip(qkv(ops, x), qkv(rounded, x), qkv(exact, x.astype(np.float64)), strict=True)
    ):
        if number:
            assert ours.dtype == np.float16
            naive = naive.astype(np.float16)
        held(ours, naive, truth)

    attention, out = random(7, tokens, heads, width), matrix(8, d, heads * width)
    bias = random(9, d)
    results = [
        backend.project(x.astype(dtype), attention.astype(dtype), backend.unpacked(backend.weight(out)), bias)
        if backend is ops
        else backend.project(x.astype(dtype), attention.astype(dtype), backend.weight(out), bias)
        for backend, dtype in ((ops, np.float32), (rounded, np.float32), (exact, np.float64))
    ]
    held(*results)

    gate_up, down = [matrix(10, f, d), matrix(11, f, d)], matrix(12, d, f)
    gate_bias = random(13, 2 * f) if width != 64 else None
    results = []
    for backend, dtype in ((ops, np.float32), (rounded, np.float32), (exact, np.float64)):
        first, second = backend.weight(*gate_up), backend.weight(down)
        if backend is ops:
            first, second = ops.unpacked(first), ops.unpacked(second)
        results.append(backend.feed_forward(x.astype(dtype), gain, 1e-5, first, gate_bias, second, None))
    held(*results)


def packed(seed: int, rows: int, columns: int) -> TensorInfo:
    import gguf

    values = random(seed, rows, columns) / np.float32(np.sqrt(columns))
    return TensorInfo("w", (rows, columns), GGMLQuantizationType.Q8_0, gguf.quantize(values, GGMLQuantizationType.Q8_0))


def as_floats(tensor: TensorInfo) -> TensorInfo:
    from slimrt.weights.quants import dequantize

    return TensorInfo("w", tensor.shape, GGMLQuantizationType.F32, dequantize(tensor))


@pytest.mark.parametrize("sizes", [SIZES[0], (4, 2, 16, 64, 288), (2, 2, 128, 128, 64)], ids=str)
def test_a_layer_of_packed_weights(ops: FastOps, sizes: tuple[int, ...]) -> None:
    heads, kv_heads, width, d, f = sizes
    to_whole = packed_shape(ops.features).whole
    exact = Naive(lambda x: x, np.float64)
    naive = Naive(int16 if to_whole else rounding(ops), np.float32)
    x, gain, cos = random(0, 37, d), random(1, d), np.ones((37, width // 2), np.float32)
    parts = [packed(3 + i, n * width, d) for i, n in enumerate((heads, kv_heads, kv_heads))]
    gate_up, down, bias = [packed(10, f, d), packed(11, f, d)], packed(12, d, f), random(13, 2 * f)

    def layer(backend: NumpyOps, dtype: type) -> list[Array]:
        def ready(*parts: TensorInfo) -> Weight:
            if backend is ops:
                return backend.unpacked(backend.weight(*parts))
            return backend.weight(*(as_floats(part) for part in parts))

        given, kinds = x.astype(dtype), (heads, kv_heads, width)
        q, k, v = backend.qkv(given, gain, 1e-5, ready(*parts), None, cos, 0 * cos, kinds)
        first, second = ready(*gate_up), ready(down)
        return [q, *(half.astype(np.float16) for half in (k, v)), backend.linear(given, ready(parts[0])),
                backend.feed_forward(given, gain, 1e-5, first, bias, second, None)]  # fmt: skip

    for ours, rounded, truth in zip(
        layer(ops, np.float32), layer(naive, np.float32), layer(exact, np.float64), strict=True
    ):
        held(ours, rounded, truth)


@pytest.mark.parametrize("floats", ["down", "gate_up"])
def test_a_feed_forward_of_packed_weights_and_floats(ops: FastOps, floats: str) -> None:
    d, f = 64, 288
    x, gain = random(0, 20, d), random(1, d)
    matrices = {"gate_up": (packed(2, f, d), packed(3, f, d)), "down": (packed(4, d, f),)}
    matrices[floats] = tuple(as_floats(part) for part in matrices[floats])

    def pass_through(backend: NumpyOps, dtype: type) -> Array:
        first, second = (
            backend.unpacked(backend.weight(*parts))
            if backend is ops
            else backend.weight(*(as_floats(part) if part.type.name == "Q8_0" else part for part in parts))
            for parts in (matrices["gate_up"], matrices["down"])
        )
        return backend.feed_forward(x.astype(dtype), gain, 1e-5, first, None, second, None)

    naive = Naive(int16 if packed_shape(ops.features).whole else rounding(ops), np.float32)
    exact = Naive(lambda x: x, np.float64)
    held(pass_through(ops, np.float32), pass_through(naive, np.float32), pass_through(exact, np.float64))


def attention(
    q: Array, k: Array, v: Array, reach: tuple[int, ...], dtype: type, rounded: Callable[[Array], Array]
) -> Array:
    """By the rule itself, row by row; the factors of both products rounded."""
    tokens, heads, width = q.shape
    kv_heads, keys, _ = k.shape
    rows, columns = np.arange(keys - tokens, keys)[:, None], np.arange(keys)[None, :]
    out = np.empty(q.shape, dtype)
    for head in range(heads):
        group = head // (heads // kv_heads)
        begin = np.array([first_row(reach[group], row) for row in rows[:, 0]])[:, None]
        seen = (columns <= rows) & ((columns >= begin) | (columns < 64))
        scores = rounded(q[:, head].astype(dtype)) @ rounded(k[group].astype(dtype)).T / dtype(np.sqrt(width))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = rounded(weights) @ rounded(v[group].astype(dtype)) / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize(("tokens", "keys"), [(2, 2), (17, 17), (129, 129), (300, 1100), (40, 1111)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (2, 2, 80), (4, 1, 96), (2, 1, 128), (3, 1, 10)])
@pytest.mark.parametrize("far", [0, 192])
def test_attention(ops: FastOps, heads: int, kv_heads: int, width: int, tokens: int, keys: int, far: int) -> None:
    q = random(0, tokens, heads, width)
    k, v = (random(seed, kv_heads, keys + 9, width).astype(np.float16)[:, :keys] for seed in (1, 2))
    reach = tuple(far * (head % 2 == 0) for head in range(kv_heads))
    ours = ops.attend(q, k, v, reach=reach)
    assert ours.dtype == np.float32
    truth = attention(q, k, v, reach, np.float64, lambda x: x)
    naive = attention(q, k, v, reach, np.float32, rounding(ops))
    held(ours, naive, truth)


def test_precise_attention_is_that_of_a_processor_without_bfloat16() -> None:
    """Whatever this processor has: the kernels that are chosen run on any."""
    q, k, v = random(0, 40, 9, 64), *(random(seed, 3, 111, 64).astype(np.float16) for seed in (1, 2))
    expected = FastOps(1, features=detect().without("bf16")).attend(q, k, v)
    found = FastOps(1, features=replace(detect(), bf16=True, amx=True)).attend(q, k, v, precise=True)
    assert np.array_equal(found, expected)


def test_attention_where_early_keys_win(ops: FastOps) -> None:
    """Later blocks exceed the reference maximum by far, and fall below it by far: rows are rescaled on the way."""
    tokens, width = 700, 64
    q = random(0, tokens, 2, width)
    k, v = random(1, 1, tokens, width) * 0.01, random(2, 1, tokens, width)
    k[0, 3] = q[-1, 0] * 4
    k[0, 400] = q[-1, 0] * 8
    k[0, 650] = q[-1, 1] * 6
    k, v = k.astype(np.float16), v.astype(np.float16)
    truth = attention(q, k, v, (0,), np.float64, lambda x: x)
    naive = attention(q, k, v, (0,), np.float32, rounding(ops))
    held(ops.attend(q, k, v), naive, truth)


def test_a_row_gives_the_same_bits_in_any_company(ops: FastOps) -> None:
    """A prompt read in parts gives the same bits as in one piece: rows do not depend on what they run with."""
    heads, kv_heads, width, d, f = SIZES[0]
    x, gain, bias = random(0, 333, d), random(1, d), None
    gate_up, down = (
        ops.unpacked(ops.weight(matrix(2, f, d), matrix(3, f, d))),
        ops.unpacked(ops.weight(matrix(4, d, f))),
    )
    whole = ops.feed_forward(x, gain, 1e-5, gate_up, bias, down, bias)
    parts = [ops.feed_forward(x[at], gain, 1e-5, gate_up, bias, down, bias) for at in (slice(0, 1), slice(1, 200))]
    assert np.array_equal(whole[:200], np.concatenate(parts))
    q = random(0, 700, heads, width)
    k, v = (random(seed, kv_heads, 700, width).astype(np.float16) for seed in (1, 2))
    for reach in (None, (0, 192, 64)):
        whole = ops.attend(q, k, v, reach=reach)
        for lo, hi in ((0, 2), (2, 135), (135, 700)):
            assert np.array_equal(whole[lo:hi], ops.attend(q[lo:hi], k[:, :hi], v[:, :hi], reach=reach))


def test_callers_in_several_threads_do_not_mix(ops: FastOps) -> None:
    """Sessions of one model may compute at a time: the kernels' scratch is shared, and grows."""
    width, failures = 64, []
    cases = []
    for tokens in (20, 700, 150, 400):
        q = random(tokens, tokens, 4, width)
        k, v = (random(tokens + seed, 2, tokens, width).astype(np.float16) for seed in (1, 2))
        cases.append((q, k, v, FastOps(1, features=ops.features).attend(q, k, v)))
    fresh = FastOps(2, features=ops.features)

    def work(q: Array, k: Array, v: Array, expected: Array) -> None:
        for _ in range(5):
            if not np.array_equal(fresh.attend(q, k, v), expected):
                failures.append(len(q))

    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_logits_of_many_rows(ops: FastOps) -> None:
    """The head has more columns than a kernel keeps waiting, and no whole number of groups of them."""
    head = matrix(0, 2100, 64)
    x = random(1, 70, 64)
    rounded = rounding(ops)
    held(
        ops.linear(x, ops.weight(head)),
        rounded(x) @ rounded(head.data).T,
        x.astype(np.float64) @ head.data.astype(np.float64).T,
    )


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_packed_matrices_are_held_as_they_lie_in_the_file(kind: GGMLQuantizationType) -> None:
    tensor = packed_rows(kind, 2, 256)
    (part,) = FastOps(1).weight(tensor).parts
    assert part is tensor


@pytest.mark.parametrize("kind", ["IQ1_S", "TQ1_0", "F64"])
def test_types_without_a_dot_product_become_bfloat16(kind: str) -> None:
    import gguf

    from slimrt.weights.quants import dequantize
    from tests.tiny_gguf import random_tensor

    backend = FastOps(1)
    type_ = GGMLQuantizationType[kind]
    data = random_tensor(type_, (48, 256), np.random.default_rng(0))
    tensor = TensorInfo("w", (48, 256), type_, data)
    assert gguf.GGML_QUANT_SIZES[type_]
    (part,) = backend.weight(tensor).parts
    assert part.type == GGMLQuantizationType.BF16
    assert np.array_equal(dequantize(part), bfloat16(dequantize(tensor)))
    assert np.array_equal(
        backend.embed(backend.weight(tensor), np.array([5, 1, 5])), bfloat16(dequantize(tensor))[[5, 1, 5]]
    )


def test_masking_takes_what_builds_on_it() -> None:
    full = replace(detect(), avx2=True, avxvnni=False, avx512=True, vnni=True, bf16=True, amx=True)
    assert full.without("bf16") == Features(avx2=True, avx512=True, vnni=True)
    assert full.without("avx512") == Features(avx2=True)
    assert full.without("avx2") == Features()
    assert full.without("amx").words == "AVX-512 with VNNI, BF16"
    assert len({features.key for features in (full, full.without("amx"), full.without("bf16"), Features())}) == 4
