"""The feed-forward of a mixture of experts in decode: jobs that read only the chosen experts' bytes.

Which experts those are is known in the midst of the program. So the job that chooses them writes, into the arguments of
the products behind it, where the matrices of the chosen ones lie; nothing else about the products changes.

    router                         (rows)
    choose experts, place them     (one item)
    gate, up of the chosen ones    (rows)
    act(gate) * up * weight        (records)
    their down's weighted biases   (one item; where they have any)
    down of each, added            (rows; one job an expert, for each adds to what the one before has left)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import float32, int64

from slimrt.ops.fast.features import Features
from slimrt.ops.fast.gemv import HEAD, PART, Product, Rows, add_products
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import exp
from slimrt.ops.fast.team import Program, address
from slimrt.ops.fast.vectors import (
    F32X16,
    argument,
    fma,
    load,
    load_scalar,
    max_lanes,
    maximum,
    splat,
    store,
    store_scalar,
    sum_lanes,
)

__all__ = ["Stacked", "add_biases_kernel", "add_stacked", "choose_kernel"]

_LOWEST = -1e30


@dataclass(frozen=True)
class Stacked:
    """The same matrix of every expert: ``first`` of expert 0, ``places`` int64 [E, 3] the addresses of each one's rows,
    of their ends and of its bias (0: none); ``held`` are these arrays."""

    first: Rows
    places: np.ndarray
    held: Sequence[np.ndarray]

    @classmethod
    def of(
        cls, weights: Sequence[Any], part: int, features: Features, biases: Sequence[np.ndarray] | None = None
    ) -> Stacked:
        """Of the part with this number of each expert's stacked ``weights``; ``biases``: of all parts."""
        rows = [Rows.of(weight.parts[part], features) for weight in weights]
        places = np.array([[address(one.tensor.data), address(one.ends), 0] for one in rows], np.int64)
        held = [one.ends for one in rows]
        if biases is not None:
            first = sum(before.shape[0] for before in weights[0].parts[:part])
            of_part = [bias[first : first + rows[0].tensor.shape[0]].copy() for bias in biases]
            places[:, 2] = [address(bias) for bias in of_part]
            held += of_part
        return cls(rows[0], places, held)


@cache
def choose_kernel(features: Features) -> Kernel:
    """The ``used`` largest of softmax(logits [E]), largest first, as ``layer.chosen_experts``; then where they lie.

    Args: 0 logits f32, padded to 16, which are overwritten, 1 E, 2 used, 3 whether to normalise, 4 weights out f32
    [used], 5 chosen out int64 [used], 6 words to write int64 [n, 3]: address of a matrix's address in a job's
    arguments, address of ``Stacked.places``, which of the chosen; 7 n.
    """

    def choose(item, thread, args):
        logits, count, used = argument(args, 0), argument(args, 1), argument(args, 2)
        weights, chosen = argument(args, 4), argument(args, 5)
        for i in range(count, (count + 15) // 16 * 16):
            store_scalar(logits + i * 4, float32(_LOWEST))
        peaks = splat(F32X16, _LOWEST)
        for i in range(0, count, 16):
            peaks = maximum(peaks, load(F32X16, logits + i * 4))
        peak, total = splat(F32X16, max_lanes(peaks)), splat(F32X16, 0.0)
        for i in range(0, count, 16):
            shares = exp(load(F32X16, logits + i * 4) - peak)
            store(logits + i * 4, shares)
            total = total + shares
        whole = sum_lanes(total)
        kept = float32(0.0)
        for slot in range(used):
            best, at = float32(-1.0), 0
            for i in range(count):
                share = load_scalar(float32, logits + i * 4)
                if share > best:
                    best, at = share, i
            store_scalar(logits + at * 4, float32(-2.0))
            store_scalar(weights + slot * 4, best)
            store_scalar(chosen + slot * 8, int64(at))
            kept += best
        if argument(args, 3) != 0:
            whole = kept
        for slot in range(used):
            # NaN where the logits are: it is seen in the results.
            store_scalar(weights + slot * 4, float32(load_scalar(float32, weights + slot * 4) / whole))
        words = argument(args, 6)
        for number in range(argument(args, 7)):
            entry = words + number * 24
            expert = argument(chosen, argument(entry, 2))
            place = argument(entry, 1) + expert * 24
            store_scalar(argument(entry, 0), int64(argument(place, 0)))
            store_scalar(argument(entry, 0) + 32, int64(argument(place, 1)))
            store_scalar(argument(entry, 0) + 64, int64(argument(place, 2)))

    return compile_kernel(choose, features.key)


@cache
def add_biases_kernel(features: Features) -> Kernel:
    """``out = before + (weights[:, None] * biases[chosen]).sum(axis=0)`` [n], one item; ``before`` 0 is zeros.

    Args: 0 before, 1 out, 2 n, 3 weights f32 [used], 4 chosen int64 [used], 5 used, 6 ``Stacked.places`` of the biases.
    All vectors are padded to 16.
    """

    def add(item, thread, args):
        before, out, weights, chosen = argument(args, 0), argument(args, 1), argument(args, 3), argument(args, 4)
        for i in range(0, argument(args, 2), 16):
            total = splat(F32X16, 0.0)
            if before != 0:
                total = load(F32X16, before + i * 4)
            for slot in range(argument(args, 5)):
                bias = argument(argument(args, 6) + argument(chosen, slot) * 24, 2)
                total = fma(load(F32X16, bias + i * 4), splat(F32X16, load_scalar(float32, weights + slot * 4)), total)
            store(out + i * 4, total)

    return compile_kernel(add, features.key)


def add_stacked(
    program: Program, ops: Any, source: int, outs: Sequence[int], stacks: Sequence[Stacked], residual: int = 0
) -> list[int]:
    """Jobs that multiply one vector with a matrix of a chosen expert each: the addresses, in their arguments, of the
    matrices' addresses, in the order of ``stacks``; ``residual`` is added to each."""
    products = [Product(stack.first, out, 0, 0, residual) for stack, out in zip(stacks, outs, strict=True)]
    found: dict[int, int] = {}
    for words, same in add_products(program, ops.features, ops.threads, source, 0, 1, products):
        for number, product in enumerate(same):
            place = next(i for i, one in enumerate(products) if one is product)
            found[place] = address(words) + (HEAD + number * PART + 1) * 8
    return [found[place] for place in range(len(products))]
