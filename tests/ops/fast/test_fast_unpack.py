"""Packed rows to panels, against gguf's own dequantiser: bit for bit."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("numba")

from slimrt.ops.fast.features import detect
from slimrt.ops.fast.gemv import aligned_zeros
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.unpack import PANEL, unpack
from tests.fast_cases import KINDS, packed_rows, unpacked, usable

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("target", "mask", "threads", "past_caches"),
    [("bf16", (), 3, False), ("bf16", ("bf16",), 1, True), ("f32", ("avx512",), 2, False), ("f32", (), 1, True)],
)
def test_panels(
    kind: GGMLQuantizationType, target: Literal["bf16", "f32"], mask: tuple[str, ...], threads: int, past_caches: bool
) -> None:
    features = usable(mask)
    elements, _ = GGML_QUANT_SIZES[kind]
    sizes = (
        ((1, 1), (16, 33), (35, 256), (50, 615)) if elements == 1 else ((1, elements), (35, 3 * elements), (16, 768))
    )
    team = Team(threads)
    for rows, columns in sizes:
        tensor = packed_rows(kind, rows, columns)
        truth = unpacked(tensor)
        width = columns if target == "f32" else -(-columns // 32) * 32
        panels = -(-rows // PANEL)
        padded = np.zeros((panels * PANEL, width), np.float32)
        padded[:rows, :columns] = truth
        element = np.float32 if target == "f32" else np.uint16
        # Panels on lines' boundaries, and something behind them that must stay.
        memory = aligned_zeros(1, (panels * PANEL * width + 16) * np.dtype(element).itemsize)
        out = memory[0].view(element)[: panels * PANEL * width + 16]
        out[:] = 77
        program = Program()
        kernel = unpack(features, kind, target, past_caches=past_caches)
        program.add(
            kernel, panels, address(tensor.data), tensor.nbytes // rows, rows, columns, address(out), width
        )  # fmt: skip
        team.run(program)
        assert (out[-16:] == 77).all()
        if target == "f32":
            ours = out[:-16].reshape(panels, width, PANEL).transpose(0, 2, 1)
            expected = padded.view(np.uint32)
            assert np.array_equal(np.ascontiguousarray(ours).view(np.uint32).reshape(padded.shape), expected)
        else:
            ours = out[:-16].reshape(panels, width // 2, PANEL, 2).transpose(0, 2, 1, 3)
            # vcvtneps2bf16 takes numbers below 2**-126 for 0; those of a model are far above.
            assert np.abs(padded[padded != 0]).min() > 2.0**-126
            assert np.array_equal(ours.reshape(padded.shape), to_bfloat(padded))
