"""Products of few rows with packed weights, against gguf's dequantiser and float64."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("numba")

from slimrt.ops.fast.activations import (
    HALVES,
    NATURAL,
    PAIRS,
    RECORD,
    RECORD_BYTES,
    SCALES,
    SCALES16,
    SUMS,
    SUMS16,
    activation_bytes,
    padded,
    quantize_kernel,
    quantized,
)  # fmt: skip
from slimrt.ops.fast.dots import FORMATS, format_of
from slimrt.ops.fast.features import detect
from slimrt.ops.fast.gemv import aligned_zeros, linear_few
from slimrt.ops.fast.team import Program, Team, address
from slimrt.weights.gguf import TensorInfo
from tests.fast_cases import KINDS, MASKS, packed_rows, unpacked, usable
from tests.tolerance import EPS32, SLACK

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

Kind = GGMLQuantizationType


def product(x: np.ndarray, parts: list[TensorInfo], mask: tuple[str, ...] = (), threads: int = 1) -> np.ndarray:
    ops = SimpleNamespace(features=usable(mask), threads=threads, team=Team(threads))
    shape = sum(part.shape[0] for part in parts), x.shape[1]
    return linear_few(ops, x, SimpleNamespace(parts=tuple(parts), shape=shape))


def test_every_type_has_a_dot_product() -> None:
    assert set(FORMATS) == set(KINDS)
    with pytest.raises(KeyError):
        format_of(Kind.IQ1_M, detect())


# But for those that differ from others only in what ``test_fast_unpack`` holds: grid points and their scales.
MULTIPLIED = [kind for kind in KINDS if kind not in (Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ3_XXS)]
# Types whose products are tried with several vectors at once: one for each ``multiply`` that there is.
TOGETHER = {Kind.F16, Kind.Q4_1, Kind.Q8_0, Kind.IQ4_NL, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS, Kind.IQ3_S}


@pytest.mark.parametrize("kind", MULTIPLIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("mask", MASKS, ids="-".join)
def test_products(kind: GGMLQuantizationType, mask: tuple[str, ...]) -> None:
    elements, _ = GGML_QUANT_SIZES[kind]
    columns = (1, 63, 64, 200, 577) if elements == 1 else tuple(elements * n for n in (1, 3, 4, 18))
    for rows, width, tokens, threads in zip(
        (9, 7, 130, 33, 64), columns, (1, 1, 15, 3, 2), (1, 2, 3, 5, 1), strict=False
    ):
        if kind not in TOGETHER:
            tokens = 1
        tensor = packed_rows(kind, rows, width)
        x = np.random.default_rng(rows).standard_normal((tokens, width)).astype(np.float32)
        ours = product(x, [tensor], mask, threads)
        weights = unpacked(tensor)
        # What the kernel is to compute: x in int8 for packed types. And the same naively in float32.
        rounded = quantized(x) if format_of(kind, detect()).quantized else x
        model = rounded.astype(np.float64) @ weights.T.astype(np.float64)
        unit = np.abs(rounded @ weights.T - model).max() + EPS32 * np.abs(model).max()
        assert np.abs(ours - model).max() <= SLACK * unit
        # What was meant, with x as it is: as far off as rounding x makes the naive product.
        truth = x.astype(np.float64) @ weights.T.astype(np.float64)
        assert np.abs(ours - truth).max() <= 2 * np.abs(rounded @ weights.T - truth).max() + SLACK * unit


@pytest.mark.parametrize("mask", MASKS, ids="-".join)
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q6_K, Kind.IQ4_NL], ids=lambda kind: kind.name)
def test_largest_integers(kind: GGMLQuantizationType, mask: tuple[str, ...]) -> None:
    """Products of the largest integers of both signs: sums of 16 bits must not saturate on the way."""
    tensor = packed_rows(kind, 4, 256)
    data = tensor.data.copy().reshape(4, -1, GGML_QUANT_SIZES[kind][1])
    codes = data[..., :192] if kind == Kind.Q6_K else data[..., 2:]
    for row, value in enumerate((0x80, 0x7F, 0xFF, 0x00)):
        codes[row] = value
    tensor = TensorInfo("w", tensor.shape, kind, data.reshape(4, -1))
    for sign in (1.0, -1.0):
        x = np.full((1, 256), sign, np.float32)
        model = quantized(x).astype(np.float64) @ unpacked(tensor).T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(unpacked(tensor)).T.astype(np.float64)
        ours = product(x, [tensor], mask)
        # The integer part is exact; an offset of up to 32 is taken off in float32, see dots.
        assert (np.abs(ours - model) <= 32 * SLACK * EPS32 * np.maximum(size, model.max())).all()


def test_parts_of_several_types() -> None:
    kinds = (Kind.Q4_K, Kind.Q6_K, Kind.F16, Kind.Q4_K)
    parts = [packed_rows(kind, rows, 512, seed=rows) for kind, rows in zip(kinds, (40, 9, 1, 70), strict=True)]
    x = np.random.default_rng(1).standard_normal((2, 512)).astype(np.float32)
    joint = product(x, parts, threads=2)
    at = 0
    for part in parts:
        assert np.array_equal(joint[:, at : at + part.shape[0]], product(x, [part]))
        at += part.shape[0]
    assert at == joint.shape[1]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [(Kind.Q4_1, 64), (Kind.Q5_0, 32), (Kind.F16, 3)],
    ids=str,
)
def test_nothing_is_read_behind_the_matrix(kind: GGMLQuantizationType, columns: int) -> None:
    """Rows much shorter than a span; behind the last one lies what would turn every sum into NaN."""
    tensor = packed_rows(kind, 3, columns)
    memory = np.full(tensor.nbytes + 256, 0xFF, np.uint8)  # float16 0xFFFF is NaN
    memory[: tensor.nbytes] = tensor.data.view(np.uint8).reshape(-1)
    data = memory[: tensor.nbytes].view(tensor.data.dtype).reshape(tensor.data.shape)
    placed = TensorInfo("w", tensor.shape, tensor.type, data)
    x = np.ones((1, columns), np.float32)
    rounded = quantized(x) if columns % 32 == 0 else x
    weights = unpacked(tensor)
    truth = rounded.astype(np.float64) @ weights.T.astype(np.float64)
    naive = np.abs(rounded @ weights.T - truth).max()
    assert np.abs(product(x, [placed]) - truth).max() <= SLACK * (naive + EPS32 * np.abs(truth).max())


@pytest.mark.parametrize("kind", MULTIPLIED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stay_so(kind: GGMLQuantizationType, value: float) -> None:
    x = np.ones((1, 256), np.float32)
    x[0, 70] = value
    assert not np.isfinite(product(x, [packed_rows(kind, 5, 256)])).any()


@pytest.mark.parametrize("mask", MASKS, ids="-".join)
def test_records(mask: tuple[str, ...]) -> None:
    """Every field of a record against its definition."""
    columns = 300
    x = np.random.default_rng(0).standard_normal(columns).astype(np.float32)
    x[64:96] = 0  # a block without a scale
    buffer = aligned_zeros(1, activation_bytes(columns))
    buffer[0, : columns * 4].view(np.float32)[:] = x
    program = Program()
    program.add(quantize_kernel(usable(mask)), 1, address(buffer), buffer.strides[0], padded(columns))
    Team(1).run(program)
    whole = np.zeros(padded(columns), np.float32)
    whole[:columns] = x
    scale = np.abs(whole.reshape(-1, 4, 32)).max(axis=-1) / np.float32(127)
    for number in range(padded(columns) // RECORD):
        start = padded(columns) * 4 + number * RECORD_BYTES
        record = buffer[0, start : start + RECORD_BYTES]

        def field(at: int, count: int, record: np.ndarray = record) -> np.ndarray:
            return record[at : at + 4 * count].view(np.float32)

        q = record[NATURAL : NATURAL + RECORD].view(np.int8).reshape(4, 32)
        d = field(SCALES, 4)
        assert np.array_equal(d, scale[number])
        model = quantized(whole[number * RECORD : (number + 1) * RECORD]).reshape(4, 32)
        assert np.array_equal(q * d[:, None], model)
        assert np.array_equal(record[HALVES : HALVES + RECORD].view(np.int8).reshape(2, 4, 16)[0], q[:, :16])
        assert np.array_equal(record[HALVES : HALVES + RECORD].view(np.int8).reshape(2, 4, 16)[1], q[:, 16:])
        assert np.array_equal(field(SCALES16, 16), np.repeat(d, 4))
        sums = q.astype(np.float32).reshape(4, 2, 16).sum(axis=2) * d[:, None]
        assert np.array_equal(field(SUMS16, 8).reshape(4, 2), sums)
        assert np.array_equal(field(SUMS, 4), sums.sum(axis=1))
        assert np.array_equal(
            field(PAIRS, 8).reshape(4, 2), np.stack([np.zeros(4, np.float32), sums.sum(axis=1)], axis=1)
        )


def test_rounding_of_activations_is_that_of_ggml() -> None:
    """As gguf quantises to Q8_0, but for its scale in half precision."""
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    theirs = gguf.dequantize(gguf.quantize(x, Kind.Q8_0), Kind.Q8_0)
    assert np.abs(quantized(x) - theirs).max() <= np.abs(x).max() * 2.0**-11
