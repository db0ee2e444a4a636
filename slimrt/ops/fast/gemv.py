"""Products of a few vectors with packed matrices: one kernel, made for each type of weights from its dot product.

Reading the matrix is the work. A row is read once, and unpacked once, for all vectors; one row after the other, because
the processor's prefetcher follows one stream best, helped by a prefetch some pages ahead (measured: 11 GB/s a core with
it, 7 without).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from numba import float32

from slimrt.ops.fast.activations import RECORD, RECORD_BYTES, activation_bytes, padded, quantize_kernel
from slimrt.ops.fast.dots import Format, format_of
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.kernels import Kernel, compile_kernel, inline
from slimrt.ops.fast.lanes import prefetch
from slimrt.ops.fast.team import Program, address
from slimrt.ops.fast.vectors import F32X8, F32X16, argument, load, load_scalar, splat, store, store_scalar, sum_lanes
from slimrt.weights.gguf import TensorInfo

__all__ = ["VECTORS", "Product", "Rows", "add_products", "aligned_zeros", "gemv_kernel", "gemv_scratch", "linear_few"]

_AHEAD = 4096  # bytes
_SHARES = 4  # items a thread in a product
VECTORS = 16  # that a matrix is multiplied with at once, at most
_SUMS_BYTES = 128  # of one vector's sums and minima
HEAD, PART = 8, 11  # words of a job's arguments: before the matrices, for each matrix


@dataclass(frozen=True)
class Rows:
    """A packed matrix [out, in] as the kernel takes it.

    ``ends``: the last spans of the rows whose last span would reach past the end of the matrix, zeros behind them.
    """

    format: Format
    tensor: TensorInfo
    ends: np.ndarray

    @classmethod
    def of(cls, tensor: TensorInfo, features: Features) -> Rows:
        """Raises KeyError if the type has no dot product."""
        form = format_of(tensor.type, features)
        rows = tensor.data.view(np.uint8).reshape(len(tensor.data), -1)
        stride = rows.shape[1]
        spans = -(-tensor.shape[-1] // form.span)
        count = min(len(rows), -(-(spans * form.nbytes) // stride))
        ends = np.zeros((count, form.nbytes), np.uint8)
        start = (spans - 1) * form.nbytes
        ends[:, : stride - start] = rows[len(rows) - count :, start:]
        return cls(form, tensor, ends)

    @property
    def spans(self) -> int:
        """Of a row."""
        return -(-self.tensor.shape[-1] // self.format.span)

    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """For ``gemv_kernel``: address, bytes a row, rows, spans a row, the address of ``ends``, how many these are."""
        rows = self.tensor.shape[0]
        stride = self.tensor.nbytes // rows
        return address(self.tensor.data), stride, rows, self.spans, address(self.ends), len(self.ends)


@cache
def gemv_kernel(features: Features, kind: GGMLQuantizationType, *, several: bool = False) -> Kernel:
    """``out[t, r] = w[r] @ x[t] (+ bias[r]) (+ residual[t, r])`` for the rows r of an item, of several matrices w.

    For one vector, or (``several``) up to ``VECTORS`` of them: a span of w is unpacked once for all, and the sums, in
    the same order as for one, wait in scratch. So a vector gives the same bits among others as alone.

    Args: 0 activation buffers, 1 bytes from one to the next, 2 padded columns, 3 vectors, 4 rows an item, 5 matrices, 6
    scratch, 7 bytes of it for a thread; then for each matrix ``PART`` words: its first item, ``Rows.arguments``, out,
    bytes from one vector's out to the next, bias or 0, residual (with out's distances) or 0.
    """
    form = format_of(kind, features)
    unpack, multiply, nbytes = form.unpack, form.multiply, form.nbytes
    offset = np.float32(form.offset)
    record_step = RECORD_BYTES * form.span // RECORD if form.quantized else 0
    floats_step = 0 if form.quantized else form.span * 4
    lines = -(-nbytes // 64)

    @inline
    def finish(sums, minima, part, vector, row):
        """A sum to its place."""
        out, distance, bias, residual = argument(part, 7), argument(part, 8), argument(part, 9), argument(part, 10)
        total = sum_lanes(sums)
        if offset != 0:
            total += offset * sum_lanes(minima)
        if bias != 0:
            total += load_scalar(float32, bias + row * 4)
        at = vector * distance + row * 4
        if residual != 0:
            total += load_scalar(float32, residual + at)
        store_scalar(out + at, total)

    @inline
    def ahead(w, limit):
        if w < limit:
            for line in range(lines):
                prefetch(w + _AHEAD + line * 64)

    @inline
    def row_times_one(start, last, spans, limit, floats, record, part, row):
        sums, minima = splat(F32X16, 0.0), splat(F32X8, 0.0)
        w = start
        for span in range(spans):
            if span == spans - 1:
                w = last
            ahead(w, limit)
            sums, minima = multiply(sums, minima, unpack(w), floats, record)
            w += nbytes
            record += record_step
            floats += floats_step
        finish(sums, minima, part, 0, row)

    @inline
    def row_times_all(start, last, spans, limit, floats, record, part, row, vectors, distance, scratch):
        for vector in range(vectors):
            store(scratch + vector * _SUMS_BYTES, splat(F32X16, 0.0))
            store(scratch + vector * _SUMS_BYTES + 64, splat(F32X8, 0.0))
        w = start
        for span in range(spans):
            if span == spans - 1:
                w = last
            ahead(w, limit)
            unpacked = unpack(w)
            at, x, quantized = scratch, floats, record
            for _ in range(vectors):
                sums, minima = multiply(load(F32X16, at), load(F32X8, at + 64), unpacked, x, quantized)
                store(at, sums)
                store(at + 64, minima)
                at += _SUMS_BYTES
                x += distance
                quantized += distance
            w += nbytes
            record += record_step
            floats += floats_step
        for vector in range(vectors):
            at = scratch + vector * _SUMS_BYTES
            finish(load(F32X16, at), load(F32X8, at + 64), part, vector, row)

    def gemv(item, thread, args):
        floats, distance, size = argument(args, 0), argument(args, 1), argument(args, 4)
        record = floats + argument(args, 2) * 4
        part = args + (HEAD + (argument(args, 5) - 1) * PART) * 8
        while argument(part, 0) > item:
            part -= PART * 8
        item -= argument(part, 0)
        weights, stride, rows = argument(part, 1), argument(part, 2), argument(part, 3)
        spans, ends, inner = argument(part, 4), argument(part, 5), rows - argument(part, 6)
        stop = min((item + 1) * size, rows)
        limit = weights + stop * stride - _AHEAD
        for row in range(item * size, stop):
            start = weights + row * stride
            last = start + (spans - 1) * nbytes
            if row >= inner:
                last = ends + (row - inner) * nbytes
            if several:
                scratch = argument(args, 6) + thread * argument(args, 7)
                vectors = argument(args, 3)
                row_times_all(start, last, spans, limit, floats, record, part, row, vectors, distance, scratch)
            else:
                row_times_one(start, last, spans, limit, floats, record, part, row)

    return compile_kernel(gemv, f"{features.key}-{form.kind.name}-{several}")


def gemv_scratch(threads: int) -> np.ndarray:
    """Memory for the sums of ``VECTORS`` vectors, for each of the threads."""
    return aligned_zeros(threads, VECTORS * _SUMS_BYTES)


@dataclass(frozen=True)
class Product:
    """Where one matrix's product goes: out [T, out] with ``distance`` bytes from row to row, bias and residual or 0."""

    rows: Rows
    out: int
    distance: int = 0
    bias: int = 0
    residual: int = 0


def add_products(
    program: Program,
    features: Features,
    threads: int,
    buffers: int,
    distance: int,
    vectors: int,
    products: Sequence[Product],
    scratch: np.ndarray | None = None,
) -> list[tuple[np.ndarray, list[Product]]]:
    """Jobs that multiply the vectors in activation buffers with matrices [out_i, in]: one for each type among them.

    ``scratch``: see ``gemv_scratch``; more than one vector needs it. Returns the arguments of each job, and whose
    matrices are in it.
    """
    jobs = []
    for kind in dict.fromkeys(product.rows.format.kind for product in products):
        same = [product for product in products if product.rows.format.kind == kind]
        size = _rows_an_item(sum(product.rows.tensor.shape[0] for product in same), threads)
        items, words = 0, []
        for product in same:
            words += [items, *product.rows.arguments(), product.out, product.distance, product.bias, product.residual]
            items += -(-product.rows.tensor.shape[0] // size)
        width = padded(same[0].rows.tensor.shape[-1])
        place = (0, 0) if scratch is None else (address(scratch), scratch.strides[0])
        kernel = gemv_kernel(features, kind, several=vectors > 1)
        added = program.add(kernel, items, buffers, distance, width, vectors, size, len(same), *place, *words)
        jobs.append((added, same))
    return jobs


def _rows_an_item(rows: int, threads: int) -> int:
    """So many that each thread gets some items (one may be slowed down by another program), not tiny ones."""
    return max(8, min(512, -(-rows // (_SHARES * threads))))


def linear_few(ops: Any, x: np.ndarray, weight: Any) -> np.ndarray:
    """x [T, in] @ weight.T [in, out] -> [T, out], T up to ``VECTORS``; ``weight`` has ``parts`` stacked along out."""
    columns = x.shape[1]
    out = np.empty((len(x), weight.shape[0]), np.float32)
    buffers = aligned_zeros(len(x), activation_bytes(columns))
    buffers[:, : columns * 4].view(np.float32)[...] = x
    program, at, products = Program(), address(out), []
    for tensor in weight.parts:
        products.append(Product(Rows.of(tensor, ops.features), at, out.strides[0]))
        at += tensor.shape[0] * 4
    distance = buffers.strides[0]
    if any(product.rows.format.quantized for product in products):
        program.add(quantize_kernel(ops.features), len(x), address(buffers), distance, padded(columns))
    scratch = gemv_scratch(ops.threads)
    add_products(program, ops.features, ops.threads, address(buffers), distance, len(x), products, scratch)
    ops.team.run(program)
    return out


def aligned_zeros(rows: int, nbytes: int) -> np.ndarray:
    """Zeros uint8 [rows, nbytes], each row on cache lines of its own."""
    stride = -(-nbytes // 64) * 64
    memory = np.zeros(rows * stride + 64, np.uint8)
    at = -address(memory) % 64
    return memory[at : at + rows * stride].reshape(rows, stride)
