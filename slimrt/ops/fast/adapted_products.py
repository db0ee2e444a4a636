"""What LoRA adapters add to products in decode: two thin products in float32 behind each product that they change.

t_i = x A_i.T        (one job for all adapters of a matrix: they read the same x)
out += t_i B_i.T     (a job each; scales are in B)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from slimrt.ops.adapted import Adapted, Delta
from slimrt.ops.fast.activations import padded
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.gemv import Product, Rows, aligned_zeros
from slimrt.ops.fast.team import address
from slimrt.weights.gguf import TensorInfo

__all__ = ["AdaptedProducts", "base_of", "deltas_of"]

# (source, bytes from vector to vector, products): adds them to the program
AddProducts = Callable[[int, int, Sequence[Product]], None]


def base_of(weight: Any) -> Any:
    """``weight`` without its adapters."""
    return weight.base if isinstance(weight, Adapted) else weight


def deltas_of(weight: Any) -> tuple[Delta, ...]:
    """What adapters change of ``weight``."""
    return weight.deltas if isinstance(weight, Adapted) else ()


class AdaptedProducts:
    """Adds these products to the program of a ``Decoder`` that reads up to ``most`` vectors at once."""

    def __init__(self, features: Features, most: int, add: AddProducts) -> None:
        self._features, self._most = features, most
        self._adds = weakref.WeakMethod(add)  # the decoder holds this: a circle would keep a dropped model's memory
        self._between: dict[tuple[int, int], np.ndarray] = {}  # t_i by i and rank: zeros behind the rank stay zeros
        self._kept: list[Rows] = []  # what the program has addresses of

    def add(self, source: np.ndarray, deltas: Sequence[Delta], outs: Sequence[tuple[int, np.ndarray]]) -> None:
        """Behind a product of ``source``, whose rows begin with float32 x, to ``outs``: how many outputs go to each
        array, whose rows may be longer."""
        if not deltas:
            return
        between = [self._buffer(number, delta.down.shape[1]) for number, delta in enumerate(deltas)]
        down = [
            Product(self._rows(delta.down.T), address(to), to.strides[0])
            for delta, to in zip(deltas, between, strict=True)
        ]
        self._add(address(source), source.strides[0], down)
        for delta, t in zip(deltas, between, strict=True):
            first, up, at = delta.first, delta.up.T, 0  # up [out', r]
            for count, out in outs:
                begin, end = max(first, at), min(first + len(up), at + count)
                if begin < end:
                    to = address(out) + (begin - at) * 4
                    rows = self._rows(up[begin - first : end - first])
                    self._add(address(t), t.strides[0], [Product(rows, to, out.strides[0], residual=to)])
                at += count

    def _add(self, source: int, stride: int, products: Sequence[Product]) -> None:
        add = self._adds()
        assert add is not None
        add(source, stride, products)

    def _buffer(self, number: int, rank: int) -> np.ndarray:
        if (number, rank) not in self._between:
            self._between[number, rank] = aligned_zeros(self._most, padded(rank) * 4)
        return self._between[number, rank]

    def _rows(self, matrix: np.ndarray) -> Rows:
        matrix = np.ascontiguousarray(matrix, np.float32)  # itself, as adapters are read
        rows = Rows.of(TensorInfo("adapter", matrix.shape, GGMLQuantizationType.F32, matrix), self._features)
        self._kept.append(rows)
        return rows
