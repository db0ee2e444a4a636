"""float32 to the packed types Q4_K, Q5_K and Q6_K, which the ``gguf`` package only unpacks.

The formats are ggml's (ggml-common.h): 256 weights a block, in sub-blocks with a scale (and, for Q4_K and Q5_K, a
minimum) of a few bits. What to optimise is taken from llama.cpp's ggml-quants.c: the squared error weighted by
``rms + |x|`` of a sub-block (Q4_K, Q5_K) or x^2 (Q6_K), or by an importance matrix. How is our own: a grid of scales,
each mended by least squares; then rounding to the grid points and least squares in turn; then, with scales and minima
rounded to their bits, the best neighbours of both. Errors are below llama.cpp's (``tests/weights/test_kquants.py``).

A chunk of sub-blocks lies transposed, a weight of each in a row, so that every sum runs over whole rows. Chunks are
independent; threads take them in turn, since NumPy lets go of the interpreter lock.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["KQUANTS", "quantize_k"]

Array = np.ndarray

KQUANTS = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)
"""The types that ``quantize_k`` writes."""

_BLOCK = 256
_CHUNK = 256  # blocks: 256 KiB for an array of their weights, of which some six are at hand at a time
_WORKERS = 8  # threads at most; the memory that they take grows with them
_GRID = np.arange(-2.0, 1.0, 0.25, dtype=np.float32)  # beside the number of grid points that spans a sub-block's range
_SIGNED_GRID = np.arange(-2.0, 1.0, 0.25, dtype=np.float32)
_ROUNDS = 2
_TINY = np.float32(1e-30)  # below every sum that means something: squares of the smallest float16 are 3.6e-15


def quantize_k(values: Array, kind: GGMLQuantizationType, importance: Array | None = None) -> Array:
    """``values`` float32 [rows, columns], finite, as packed blocks uint8 [rows, bytes per row].

    ``importance``: float32 [columns], how much an error counts in each column (mean squares of the layer's inputs),
    finite and not negative. Scratch is bounded by the chunk.

    Raises ValueError for a type that is not in ``KQUANTS`` and for rows that do not divide into blocks of 256.
    """
    if kind not in KQUANTS or values.shape[-1] % _BLOCK:
        raise ValueError(f"{kind.name} with rows of {values.shape[-1]}: Q4_K, Q5_K and Q6_K have blocks of {_BLOCK}")
    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, _BLOCK)
    packed = np.empty((len(blocks), size), np.uint8)
    counts = None
    if importance is not None:
        counts = np.ascontiguousarray(importance, np.float32).reshape(-1, _BLOCK)

    def pack(start: int) -> None:
        chunk = blocks[start : start + _CHUNK]
        weights = None
        if counts is not None:
            weights = counts[np.arange(start, start + len(chunk)) % len(counts)]
        with np.errstate(all="ignore"):  # sub-blocks of zeros divide by zero; they are set apart
            if kind == GGMLQuantizationType.Q6_K:
                packed[start : start + len(chunk)] = _pack_q6(*_signed(chunk, weights))
            else:
                bits = 4 if kind == GGMLQuantizationType.Q4_K else 5
                packed[start : start + len(chunk)] = _pack_affine(bits, *_affine(chunk, weights, (1 << bits) - 1))

    starts = range(0, len(blocks), _CHUNK)
    workers = min(_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1 or len(starts) == 1:
        for start in starts:
            pack(start)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(pack, starts))
    return packed.reshape(*values.shape[:-1], -1)


def _transposed(blocks: Array, width: int) -> Array:
    """Blocks [n, 256] -> [width, n * 256 / width]: sub-blocks as columns."""
    return np.ascontiguousarray(blocks.reshape(-1, width).T)


def _inverse(values: Array) -> Array:
    """1 / ``values``, 0 where they are 0."""
    return np.where(values != 0, np.float32(1) / values, np.float32(0))


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over each sub-block, for grid points ``l`` of its weights: of l, l^2 and x l."""

    l1: Array
    l2: Array
    xl: Array


class _SubBlocks:
    """Sub-blocks as columns: the weights ``x`` [width, n], how much each counts, and room to compute in."""

    def __init__(self, x: Array, counts: Array) -> None:
        self.x, self.counts = x, counts
        self.weighted = counts * x
        self.points = np.empty_like(x)
        self._room = np.empty_like(x)
        self.sum_w, self.sum_x = counts.sum(0), self.weighted.sum(0)

    def sums(self) -> _Sums:
        """For the grid points in ``points``."""
        room, points = self._room, self.points
        np.multiply(self.counts, points, out=room)
        l1 = room.sum(0)
        room *= points
        l2 = room.sum(0)
        np.multiply(self.weighted, points, out=room)
        return _Sums(l1, l2, room.sum(0))


# -- Q4_K and Q5_K: x is about scale * l - minimum, l from 0 to 15 or 31 -----------------------------------------------


def _affine(blocks: Array, importance: Array | None, top: int) -> tuple[Array, Array, Array, Array, Array]:
    """Half-precision d and dmin [n], 6-bit scales and minima [n, 8], grid points uint8 [n, 256]."""
    x = _transposed(blocks, 32)
    if importance is None:
        counts = np.sqrt(np.square(x).mean(0)) + np.abs(x)
    else:
        spread = np.repeat(2 * np.square(blocks).mean(1), 8)
        counts = _transposed(importance, 32) * np.sqrt(spread + np.square(x)) + _TINY
    parts = _SubBlocks(x, counts)
    scale, minimum = _search(parts, top)
    d, scales = _six_bits(scale.reshape(-1, 8), parts.sum_w.reshape(-1, 8))
    dmin, minima = _six_bits(minimum.reshape(-1, 8), parts.sum_w.reshape(-1, 8))
    _place(parts, d, dmin, scales, minima, top)
    scales, minima = _neighbours(parts, parts.sums(), d, dmin, scales, minima)
    _place(parts, d, dmin, scales, minima, top)
    points = np.ascontiguousarray(parts.points.T).astype(np.uint8).reshape(len(blocks), _BLOCK)
    return d, dmin, scales.astype(np.uint8), minima.astype(np.uint8), points


def _search(parts: _SubBlocks, top: int) -> tuple[Array, Array]:
    """Scale and minimum [n] of each sub-block, both at least 0."""
    x, points = parts.x, parts.points
    low = np.minimum(x.min(0), 0)
    span = x.max(0) - low
    inner = (x - low) * _inverse(span)
    best = np.full(x.shape[1], np.inf, np.float32)
    scale, minimum = span / np.float32(top), -low

    def consider() -> None:
        """Take the least-squares scale and minimum for ``points`` where their error is the least so far."""
        sums = parts.sums()
        det = parts.sum_w * sums.l2 - sums.l1 * sums.l1
        s = (parts.sum_w * sums.xl - parts.sum_x * sums.l1) / det
        m = (sums.l1 * sums.xl - sums.l2 * parts.sum_x) / det
        alone = m < 0
        np.copyto(s, sums.xl / sums.l2, where=alone)
        np.copyto(m, 0, where=alone)
        # The error, less the sum of squares that is the same for all; NaN and infinity are never better.
        error = s * (s * sums.l2 - 2 * sums.xl) + m * (m * parts.sum_w + 2 * parts.sum_x - 2 * s * sums.l1)
        better = (error < best) & (det > 0) & (s > 0)
        for kept, new in ((best, error), (scale, s), (minimum, m)):
            np.copyto(kept, new, where=better)

    for shift in _GRID:
        np.multiply(inner, top + shift, out=points)
        np.rint(points, out=points)
        np.clip(points, 0, top, out=points)  # minimum() takes twice as long
        consider()
    for _ in range(_ROUNDS):
        np.add(x, minimum, out=points)
        points *= _inverse(scale)
        np.rint(points, out=points)
        np.clip(points, 0, top, out=points)
        consider()
    return scale, minimum


def _six_bits(values: Array, counts: Array) -> tuple[Array, Array]:
    """``values`` [n, 8], at least 0, as half-precision d [n] times whole numbers up to 63."""
    d = values.max(1) / np.float32(63)
    for _ in range(_ROUNDS):
        whole = np.clip(np.rint(values * _inverse(d)[:, None]), 0, 63)
        fitted = (counts * whole * values).sum(1) / (counts * whole * whole).sum(1)
        d = np.where(np.isfinite(fitted), fitted, d).astype(np.float16).astype(np.float32)
    return d, np.clip(np.rint(values * _inverse(d)[:, None]), 0, 63)


def _place(parts: _SubBlocks, d: Array, dmin: Array, scales: Array, minima: Array, top: int) -> None:
    """The nearest grid points, into ``parts.points``."""
    points = parts.points
    np.add(parts.x, (dmin[:, None] * minima).reshape(-1), out=points)
    points *= _inverse((d[:, None] * scales).reshape(-1))
    np.rint(points, out=points)
    np.clip(points, 0, top, out=points)


def _neighbours(
    parts: _SubBlocks, sums: _Sums, d: Array, dmin: Array, scales: Array, minima: Array
) -> tuple[Array, Array]:
    """Of the scales and minima one step around, those with the least error at the same grid points."""
    l1, l2, xl = (part.reshape(scales.shape) for part in (sums.l1, sums.l2, sums.xl))
    sum_w, sum_x = parts.sum_w.reshape(scales.shape), parts.sum_x.reshape(scales.shape)
    best = np.full(scales.shape, np.inf, np.float32)
    found = scales, minima
    for step in (-1, 0, 1):
        scale = np.clip(scales + np.float32(step), 0, 63)
        s = d[:, None] * scale
        for other in (-1, 0, 1):
            minimum = np.clip(minima + np.float32(other), 0, 63)
            m = dmin[:, None] * minimum
            error = s * (s * l2 - 2 * xl) + m * (m * sum_w + 2 * sum_x - 2 * s * l1)
            better = error < best
            best = np.where(better, error, best)
            found = np.where(better, scale, found[0]), np.where(better, minimum, found[1])
    return found


def _pack_affine(bits: int, d: Array, dmin: Array, scales: Array, minima: Array, points: Array) -> Array:
    heads = np.stack([d, dmin], 1).astype("<f2").view(np.uint8).reshape(-1, 4)
    fields = np.empty((len(d), 12), np.uint8)
    fields[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    fields[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    fields[:, 8:] = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    pairs = points.reshape(-1, 4, 2, 32)
    nibbles = ((pairs[:, :, 0] & 15) | (pairs[:, :, 1] & 15) << 4).reshape(-1, 128)
    if bits == 4:
        return np.concatenate([heads, fields, nibbles], 1)
    # Bit i of byte j belongs to value j of sub-block i.
    high = np.packbits(points.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([heads, fields, high, nibbles], 1)


# -- Q6_K: x is about scale * l, l from -32 to 31 ----------------------------------------------------------------------


def _signed(blocks: Array, importance: Array | None) -> tuple[Array, Array, Array]:
    """Half-precision d [n], signed 8-bit scales [n, 16], grid points plus 32 as uint8 [n, 256]."""
    x = _transposed(blocks, 16)
    parts = _SubBlocks(x, np.square(x) if importance is None else _transposed(importance, 16) + _TINY)
    points = parts.points
    at = np.abs(x).argmax(0)
    peak = np.take_along_axis(x, at[None], 0)[0]
    best = np.zeros(x.shape[1], np.float32)
    scale = peak / np.float32(-32)

    def place(factor: Array) -> None:
        np.multiply(x, factor, out=points)
        np.rint(points, out=points)
        np.clip(points, -32, 31, out=points)

    def consider() -> None:
        sums = parts.sums()
        fitted = sums.xl / sums.l2
        gain = sums.xl * fitted  # by how much the least-squares scale lowers the error
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fitted, where=better)

    for shift in _SIGNED_GRID:
        place(-(32 + shift) * _inverse(peak))
        consider()
    for _ in range(_ROUNDS):
        place(_inverse(scale))
        consider()

    wanted = scale.reshape(-1, 16)
    largest = np.take_along_axis(wanted, np.abs(wanted).argmax(1)[:, None], 1)[:, 0]
    d = (largest / np.float32(-128)).astype(np.float16).astype(np.float32)
    scales = np.clip(np.rint(wanted * _inverse(d)[:, None]), -128, 127)
    place(_inverse((d[:, None] * scales).reshape(-1)))
    whole = np.ascontiguousarray(points.T).reshape(len(blocks), _BLOCK)
    return d, scales.astype(np.int8), (whole + 32).astype(np.uint8)


def _pack_q6(d: Array, scales: Array, points: Array) -> Array:
    # Two halves of 128 values: 64 bytes of low nibbles, then 32 bytes that hold four 2-bit tops each.
    quarters = points.reshape(-1, 2, 4, 32)
    low = np.empty((len(d), 2, 2, 32), np.uint8)
    low[:] = (quarters[:, :, :2] & 15) | (quarters[:, :, 2:] & 15) << 4
    tops = quarters >> 4
    high = tops[:, :, 0] | tops[:, :, 1] << 2 | tops[:, :, 2] << 4 | tops[:, :, 3] << 6
    head = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), head], 1)
