"""A naive computation in the compiled kernels' precision: its error is the unit in which theirs is measured.

Rounded where the kernels round: a single row to int8 in blocks of 32 before a product with packed integers; the factors
of many rows to bfloat16 where the processor multiplies that (those of attention not where keys are large), else, with
packed weights, to int16 in blocks of 256; keys and values to float16. Sums are float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.models import build, read_config
from slimrt.ops.fast.features import detect
from slimrt.ops.fast.products import packed_shape, shape_of
from slimrt.ops.numpy.numpy_ops import NumpyOps, Weight
from slimrt.prune.reach import Reach
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile

SLACK = 3  # both round in the same places; the order of sums and the processor's exponential differ
_WHOLE = {"F32", "F16", "BF16"}  # types that a single row is multiplied with as it is


def bfloat16(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to bfloat16, held as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)


def int8(x: np.ndarray) -> np.ndarray:
    """``x`` [..., n] rounded to 127 steps on either side of 0 in each block of 32."""
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)]).reshape(*x.shape[:-1], -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0))
    return (steps * step).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def int16(x: np.ndarray, length: float = 65510) -> np.ndarray:
    """``x`` [..., n] rounded to whole numbers in each block of 256 along n, the step as small as two rules allow: no
    number larger than 32767, no block, as a vector, longer than ``length`` (of weights 32765)."""
    floats = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 256)]).astype(np.float32)
    blocks = floats.reshape(*x.shape[:-1], -1, 256)
    size = np.sqrt(np.square(blocks.astype(np.float64)).sum(axis=-1, keepdims=True))
    step = np.maximum(size / length, np.abs(blocks).max(axis=-1, keepdims=True) / 32767).astype(np.float32)
    steps = np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0))
    return (steps * step).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


class _ManyRows(Weight):
    """A weight that was made ready for many rows."""


class RoundedOps(NumpyOps):
    """NumPy that rounds where compiled kernels for ``bf16`` (None: for this processor) do."""

    exact_rows = 2
    unpack_rows = 2
    kv_type = np.float16

    def __init__(self, threads: int = 1, *, bf16: bool | None = None) -> None:
        super().__init__(threads)
        self.bf16 = shape_of(detect()).bf16 if bf16 is None else bf16
        self.whole = packed_shape(detect()).whole and not self.bf16

    def _rounded(self, x: np.ndarray, weight: Weight, *length: float) -> np.ndarray:
        """A factor of many rows' products with ``weight``."""
        if self.bf16:
            return bfloat16(x)
        packed = all(part.type.name not in _WHOLE for part in weight.parts)
        return int16(x, *length) if packed and self.whole else x

    def unpacked(self, weight: Weight) -> Weight:
        assert weight.dense is not None
        return _ManyRows(weight.parts, self._rounded(weight.dense, weight, 32765))

    def linear(self, x: np.ndarray, weight: Weight, bias: Any = None, out: Any = None) -> np.ndarray:
        if len(x) == 1 and not isinstance(weight, _ManyRows):
            rounds = any(part.type.name not in _WHOLE for part in weight.parts)
            return super().linear(int8(x) if rounds else x, weight, bias, out)
        many = weight if isinstance(weight, _ManyRows) else self.unpacked(weight)
        return super().linear(self._rounded(x, many), many, bias, out)

    def qkv(self, *args: Any) -> Any:
        q, k, v = super().qkv(*args)
        return q, k.astype(np.float16), v.astype(np.float16)

    def attend(  # type: ignore[override]
        self, q: Any, k: Any, v: Any, out: Any = None, reach: Reach = None, *, places: Any = None, first: Any = None,
        cap: float = 0.0, precise: bool = False, sinks: Any = None,
    ) -> np.ndarray:  # fmt: skip
        assert reach is None or not any(reach)
        tokens, heads, width = q.shape
        kv_heads, keys, _ = k.shape
        rounded = bfloat16 if self.bf16 and tokens > 1 and not precise else np.float32
        result = np.empty_like(q) if out is None else out
        places = np.arange(keys - tokens, keys) if places is None else places
        later = np.arange(keys)[None, :] > places[:, None]
        if first is not None:
            later |= np.arange(keys)[None, :] < np.asarray(first)[:, None]
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = rounded(q[:, head]) @ rounded(k[group].astype(np.float32)).T * np.float32(1 / math.sqrt(width))
            if cap:
                scores = np.float32(cap) * np.tanh(scores / np.float32(cap))
            scores[later] = -np.inf
            peak = scores.max(axis=1, keepdims=True)
            if sinks is not None:
                peak = np.maximum(peak, sinks[head])
            weights = np.exp(scores - peak)
            total = weights.sum(axis=1, keepdims=True)
            if sinks is not None:
                total += np.exp(sinks[head] - peak)
            mixed = rounded(weights) @ rounded(v[group].astype(np.float32))
            result[:, head] = mixed / total
        return result


def session_on(ops: NumpyOps, path: Path, ctx: int) -> Session:
    """A session of the model at ``path`` on ``ops``."""
    file = GGUFFile(path)
    config = read_config(file)
    return Session(Engine(build(config, file, ops), ops, CacheConfig(ctx)), ctx)


def read_and_decoded(session: Session, ids: list[int], start: int) -> np.ndarray:
    """Logits after ``ids[:start]``, read as a prompt, and after each further token, decoded: [len(ids) - start + 1, V]
    """  # fmt: skip
    session.prefill(ids[:start])
    rows = [session.logits]
    for token in ids[start:]:
        session.extend([token])
        rows.append(session.logits)
    return np.stack([row for row in rows if row is not None])


def errors(path: Path, ours: Session, ids: list[int], start: int, **rounding: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of the logits that ``read_and_decoded`` gives, the largest errors against float32: ours and naive [rows]."""
    truth, naive, found = (
        read_and_decoded(session, ids, start)
        for session in (
            session_on(NumpyOps(1), path, ours.ctx),
            session_on(RoundedOps(1, **rounding), path, ours.ctx),
            ours,
        )
    )
    return np.abs(found - truth).max(axis=1), np.abs(naive - truth).max(axis=1)
