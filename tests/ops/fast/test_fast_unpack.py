"""Packed rows to float32 and to panels, against gguf's own dequantiser and llama.cpp's: bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("numba")

from slimrt.ops.fast.features import detect
from slimrt.ops.fast.gemv import aligned_zeros
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.unpack import PANEL, unpack
from slimrt.ops.fast.unpacked_rows import TILE_COLUMNS, row_unpacker
from slimrt.ops.fast.vectors import argument
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.quants import dequantize
from tests.fast_cases import KINDS, packed_rows, unpacked, usable

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

Kind = GGMLQuantizationType
GOLDEN = Path(__file__).parents[2] / "goldens/blocks/llama_cpp.npz"


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@cache
def row_kernel(kind: GGMLQuantizationType) -> Kernel:
    """``row_unpacker`` alone. Item: a row. Args: 0 packed rows, 1 bytes a row, 2 columns, 3 out."""
    unpack_row = row_unpacker(kind)

    def unpack_one(item, thread, args):
        to = argument(args, 3) + item * TILE_COLUMNS * 4
        unpack_row(argument(args, 0) + item * argument(args, 1), argument(args, 2), to)

    return compile_kernel(unpack_one, f"test-{kind.name}")


def rows_unpacked(tensor: TensorInfo) -> np.ndarray:
    """Each row of at most TILE_COLUMNS columns as float32 [rows, TILE_COLUMNS], by the words of the kernels."""
    rows, columns = tensor.shape
    out = np.full((rows, TILE_COLUMNS), np.nan, np.float32)
    program = Program()
    kernel = row_kernel(tensor.type)
    program.add(kernel, rows, address(tensor.data), tensor.nbytes // rows, columns, address(out))
    Team(1).run(program)
    return out


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows(kind: GGMLQuantizationType) -> None:
    """Every type, any bytes in its blocks; zeros behind the columns that there are."""
    elements, _ = GGML_QUANT_SIZES[kind]
    for columns in (1, 33, 256) if elements == 1 else sorted({elements, 256}):
        tensor = packed_rows(kind, 40, columns)
        expected = np.zeros((40, TILE_COLUMNS), np.float32)
        expected[:, :columns] = unpacked(tensor)
        assert np.array_equal(rows_unpacked(tensor).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if GGML_QUANT_SIZES[kind][0] > 1], ids=lambda kind: kind.name)
def test_bytes_of_llama_cpp(kind: GGMLQuantizationType) -> None:
    """Blocks that it has written, and the numbers that it reads from them."""
    golden = np.load(GOLDEN)
    packed, floats = golden[f"{kind.name}/bytes"].reshape(2, -1), golden[f"{kind.name}/floats"].reshape(2, -1)
    tensor = TensorInfo("w", floats.shape, kind, packed)
    assert np.array_equal(rows_unpacked(tensor).view(np.uint32), floats.view(np.uint32))
    assert np.array_equal(dequantize(tensor).view(np.uint32), floats.view(np.uint32))


# A type's numbers go to every kind of panel in the same way: of each size of blocks one.
@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1, Kind.Q4_K], ids=lambda kind: kind.name)
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
