"""Panels and products of whole numbers: how rows are rounded, that no sum overflows, what is seen of odd numbers."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("numba")

from slimrt.ops.fast.fast_ops import FastOps
from slimrt.ops.fast.features import Features, detect
from slimrt.ops.fast.gemv import aligned_zeros
from slimrt.ops.fast.panels import PanelMaker
from slimrt.ops.fast.products import packed_shape
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.unpack import PANEL
from slimrt.ops.fast.whole_panels import unpack_whole
from slimrt.weights.gguf import TensorInfo
from tests.fast_cases import packed_rows, unpacked
from tests.rounded_ops import int16
from tests.tolerance import SLACK

Kind = GGMLQuantizationType
Array = np.ndarray


def multiplying() -> Features:
    """Features of a processor that multiplies whole numbers, as near to this one's as there are."""
    own = detect().without("bf16")
    return own if own.vnni or not own.avx512 else own.without("avx512")


pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")


@pytest.fixture(scope="module")
def ops() -> FastOps:
    assert packed_shape(multiplying()).whole
    return FastOps(2, features=multiplying())


def panels_of(panels: Array, count: int, width: int) -> tuple[Array, Array]:
    """Bytes of panels as scales float32 [rows, blocks] and whole numbers int16 [rows, width]."""
    scales, numbers = [], []
    rest = panels.reshape(count, -1)
    for start in range(0, width, 256):
        many = min(256, width - start)
        scales.append(np.ascontiguousarray(rest[:, :64]).view(np.float32).reshape(-1))
        block = np.ascontiguousarray(rest[:, 64 : 64 + many * 32]).view(np.int16).reshape(count, many // 2, PANEL, 2)
        numbers.append(block.transpose(0, 2, 1, 3).reshape(count * PANEL, many))
        rest = rest[:, 64 + many * 32 :]
    assert not rest.size
    return np.stack(scales, axis=1), np.concatenate(numbers, axis=1)


# Of each size of blocks one: what is rounded are the float32 of ``test_fast_unpack``.
@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("past_caches", [False, True])
def test_panels(kind: GGMLQuantizationType, past_caches: bool) -> None:
    """Each row's block times its scale is the packed row to half a step, with steps as the rule says."""
    team, features = Team(2), multiplying()
    elements, _ = GGML_QUANT_SIZES[kind]
    for rows, columns, width in ((1, elements, elements), (35, 3 * elements, 3 * elements + 16), (16, 768, 768)):
        tensor = packed_rows(kind, rows, columns)
        count = -(-rows // PANEL)
        exact = np.zeros((count * PANEL, width), np.float32)
        exact[:rows, :columns] = unpacked(tensor)
        nbytes = count * packed_shape(features).panel_bytes(width)
        memory = aligned_zeros(1, nbytes + 16)[0].view(np.uint8)
        memory[:] = 77
        program = Program()
        kernel = unpack_whole(features, kind, past_caches)
        program.add(kernel, count, address(tensor.data), tensor.nbytes // rows, rows, columns, address(memory), width)
        team.run(program)
        assert (memory[nbytes : nbytes + 16] == 77).all()
        scales, numbers = panels_of(memory[:nbytes], count, width)
        steps = np.repeat(scales, 256, axis=1)[:, :width]
        # Half a step, and float32's rounding of the scale and of a number of up to 32767 of its steps.
        assert (np.abs(numbers * steps - exact) <= steps * (0.5 + 32767 * 3 * 2.0**-24)).all()
        naive = int16(exact, 32765)
        assert np.abs(numbers * steps - naive).max() <= steps.max() * 1.001  # a number on the border may go either way
        assert (np.abs(numbers.astype(int)) <= 32767).all()


LONGEST = [
    ("as many of one size as there are", lambda rng, n: np.ones(n)),
    ("of both signs", lambda rng, n: np.sign(rng.standard_normal(n))),
    ("one number", lambda rng, n: np.eye(n)[n // 3]),
    ("two numbers", lambda rng, n: np.eye(n)[1] - np.eye(n)[n - 1]),
    ("a few large ones", lambda rng, n: rng.standard_normal(n) * (1 + 1000 * (rng.random(n) < 0.02))),
    ("any", lambda rng, n: rng.standard_normal(n)),
    ("of all sizes", lambda rng, n: np.exp(rng.uniform(-20, 8, n)) * np.sign(rng.standard_normal(n))),
]  # fmt: skip


@pytest.mark.parametrize("make", [make for _, make in LONGEST], ids=[name for name, _ in LONGEST])
def test_no_sum_overflows(ops: FastOps, make: object) -> None:
    """Rows times themselves are the largest sums that there can be; an int32 that turned over would err by 2**32."""
    assert callable(make)
    rng = np.random.default_rng(3)
    for n in (256, 320, 1024):
        row = make(rng, n).astype(np.float32)
        x = np.stack([row, -row, np.abs(row)])
        weight = TensorInfo("w", (32, n), Kind.Q8_0, _q8(np.tile(row, (32, 1))))
        w = unpacked(weight)
        truth = x.astype(np.float64) @ w.T.astype(np.float64)
        sizes = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(w.astype(np.float64), axis=1)
        # Cauchy and Schwarz again: half a step a number, of both factors.
        assert (
            np.abs(ops.linear(x, ops.unpacked(ops.weight(weight))) - truth) <= sizes * 8 * (1 / 65510 + 1 / 32765) * 1.1
        ).all()


def _q8(values: Array) -> Array:
    import gguf

    return gguf.quantize(values.astype(np.float32), Kind.Q8_0)


def test_what_is_not_finite_is_seen_in_its_row_alone(ops: FastOps) -> None:
    weight = packed_rows(Kind.Q4_K, 32, 512)
    x = np.random.default_rng(0).standard_normal((9, 512)).astype(np.float32)
    panels = ops.unpacked(ops.weight(weight))
    whole = ops.linear(x, panels)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        odd = x.copy()
        odd[4, 300] = value
        found = ops.linear(odd, panels)
        assert np.isnan(found[4]).all()
        assert np.array_equal(np.delete(found, 4, axis=0), np.delete(whole, 4, axis=0))


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e34])
def test_numbers_of_any_size(ops: FastOps, size: float) -> None:
    """A factor passes through: but numbers under 1e-30 count as 0."""
    weight = packed_rows(Kind.Q4_1, 32, 512)
    x = np.random.default_rng(0).standard_normal((9, 512)).astype(np.float32)
    panels = ops.unpacked(ops.weight(weight))
    found = ops.linear(x * np.float32(size), panels) / np.float32(size)
    if size < 1e-30:
        assert not found.any()
    else:
        w = unpacked(weight)
        truth = x.astype(np.float64) @ w.T.astype(np.float64)
        naive = int16(x).astype(np.float64) @ int16(w, 32765).T.astype(np.float64)
        assert np.abs(found - truth).max() <= SLACK * np.abs(naive - truth).max()
    assert not ops.linear(0 * x, panels).any()


def test_a_stack_with_floats_in_it_is_made_of_floats() -> None:
    """Rows of a stacked matrix are multiplied together: one kind of factor."""
    maker = PanelMaker(multiplying(), Team(1))
    whole, floats = packed_rows(Kind.Q8_0, 16, 64), packed_rows(Kind.F16, 16, 64)
    assert maker.make([whole, whole]).shape.element == "i16"
    for parts in ([whole, floats], [floats]):
        assert maker.make(parts).shape.element == "f32"


def test_which_processors_multiply_whole_numbers() -> None:
    full = Features(avx2=True, avxvnni=True, avx512=True, vnni=True, bf16=True, amx=True)
    masks = {(): "bf16", ("amx",): "bf16", ("bf16",): "i16", ("bf16", "vnni"): "f32", ("avx512",): "i16"}
    assert {mask: packed_shape(full.without(*mask)).element for mask in masks} == masks
