"""Numbers that are not finite do not pass the compiled kernels unseen: what NumPy refuses, they do not answer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import slimrt
from slimrt.errors import ComputeError
from tests.tiny_gguf import write_tiny_llama

pytest.importorskip("numba")

from slimrt.ops.fast.features import detect
from slimrt.ops.fast.kernels import compile_kernel
from slimrt.ops.fast.lanes import exp, spoil
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.vectors import F32X16, argument, argument_float, load, store

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

NANS = np.array([0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFC000FF], np.uint32).view(np.float32)


def _exp(item, thread, args):  # type: ignore[no-untyped-def]
    store(argument(args, 1), exp(load(F32X16, argument(args, 0))))


def _spoil(item, thread, args):  # type: ignore[no-untyped-def]
    spoil(argument(args, 0), argument(args, 1), argument_float(args, 2))


def exponential(x: np.ndarray) -> np.ndarray:
    out, program = np.empty(16, np.float32), Program()
    program.add(compile_kernel(_exp, "test"), 1, address(x), address(out))
    Team(1).run(program)
    return out


def test_exp_of_nan_is_nan_and_of_infinity_its_limit() -> None:
    x = np.zeros(16, np.float32)
    x[:4], x[4], x[5] = NANS, np.inf, -np.inf
    out = exponential(x)
    assert np.isnan(out[:4]).all() and (out[6:] == 1).all()
    assert out[4] == exponential(np.full(16, 88, np.float32))[0] and 0 < out[5] < 2e-38


@pytest.mark.parametrize("count", [5, 16, 37])
def test_what_is_not_below_the_limit_spoils_all(count: int) -> None:
    kernel = compile_kernel(_spoil, "test")
    for value, largest, spoils in (
        (65519.0, 65520.0, False), (65537.0, 65520.0, True), (2e38, 3e38, False), (np.inf, 3e38, True),
        (-np.inf, 65520.0, True), *((nan, 3e38, True) for nan in NANS),
    ):  # fmt: skip
        for at in {0, count // 2, count - 1}:
            x, program = np.arange(count + 1, dtype=np.float32), Program()
            x[at] = value
            before = x.copy()
            program.add(kernel, 1, address(x), count, float(largest))
            Team(1).run(program)
            assert np.isnan(x[:count]).all() if spoils else np.array_equal(x, before), (value, at)
            assert x[count] == count  # not ours


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ["attn_q", "attn_k"])
def test_weights_that_are_not_finite_give_no_answer(tmp_path: Path, name: str, kind: str, number: float) -> None:
    """One number of one matrix, in a layer that others follow."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", type=kind, n_layers=3)
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == f"blk.1.{name}.weight")
    row = tensor.data[3]
    if kind == "F32":
        row[7] = number
    elif kind == "BF16":
        row.view(np.uint16)[7] = np.array([number], np.float32).view(np.uint32)[0] >> 16
    else:  # a value, or the scale of a block
        row.view(np.float16)[0] = number
    del row, tensor, reader
    llm = slimrt.load(path, ctx=512, device="cpu", prune="off")
    assert llm.backend.ops.name == "fast"
    ids = np.random.default_rng(0).integers(3, 200, 300).tolist()
    for length in (1, 2, 17, 300):
        with pytest.raises(ComputeError, match="not finite"):
            llm.logits(ids[:length])
    with pytest.raises(ComputeError, match="not finite"):
        llm.generate(ids[:5], max_tokens=3)


def test_keys_beyond_float16_are_no_answer_either(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", arch="qwen2")
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.name == "blk.0.attn_k.weight":
            tensor.data[3] = 3e6  # by more than any scale of the biases would mend
    del tensor, reader
    llm = slimrt.load(path, ctx=512, device="cpu", prune="off")
    for length in (1, 5):
        with pytest.raises(ComputeError, match="not finite"):
            llm.logits(list(range(3, 3 + length)))
