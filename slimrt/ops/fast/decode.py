"""One token through all layers as one program of the team: no interpreter between the products.

Per layer, each line a job that begins when the one before has ended:

    norm, rounded to int8          (one item)
    q, k, v                        (rows)
    rotate q and k, append k and v (one item)
    attention                      (KV heads x spans of keys)
    join the spans, round to int8  (one item)
    output projection + residual   (rows)
    norm, rounded to int8          (one item)
    gate, up                       (rows)
    silu(gate) * up, rounded       (records)
    down + residual                (rows)

Norms behind a part and multipliers of the residual stream are a job more. With experts the router's product and the
choice come before gate and up, and the choice writes into the arguments of the products behind it which matrices they
read (``mixture.py``).

Behind the last layer stand a norm and the head. The residual stream goes from ``hidden`` to the layer's row of
``middle`` (after attention) and back to ``hidden``. What changes from token to token are a few words of the jobs'
arguments: how many rows a layer holds, and where they lie. Under a KV budget the cache chooses what the query reads:
there the program halts before every attention.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import float32

from slimrt.ops.fast.activations import (
    RECORD,
    RECORD_BYTES,
    activation_bytes,
    padded,
    quantize_record,
    quantize_row,
)
from slimrt.ops.fast.attend_few import ITEMS, Grouping, attend_kernel, join_kernel, partial_bytes, spans_for
from slimrt.ops.fast.elements import activation_argument
from slimrt.ops.fast.features import Features
from slimrt.ops.fast.gemv import Product, Rows, add_products, aligned_zeros
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.lanes import exp, spoil
from slimrt.ops.fast.layer_kernels import head_norm_words, norm_heads, norm_in_place
from slimrt.ops.fast.mixture import Stacked, add_stacked, choose_kernel, gate_experts_kernel, gate_items
from slimrt.ops.fast.team import Program, address
from slimrt.ops.fast.vectors import (
    F16X16,
    F32X16,
    argument,
    argument_float,
    convert,
    fma,
    load,
    load_scalar,
    splat,
    store,
    store_scalar,
    sum_lanes,
)
from slimrt.ops.forks import after_fork, open_lock
from slimrt.ops.protocol import Cache

__all__ = ["Decoder"]

_RECORDS = 4  # of silu(gate) * up that an item computes


@cache
def norm_kernel(features: Features) -> Kernel:
    """``out = x / np.sqrt(np.mean(x * x) + eps) * gain`` [n], all padded with zeros to 16; then rounded to int8.

    Args: 0 x, 1 gain or 0 (out = x), 2 n, 3 eps (float), 4 out, 5 padded columns, 6 whether to round, 7 whether to
    subtract the mean from x first.
    """

    def norm(item, thread, args):
        x, gain, count, out = argument(args, 0), argument(args, 1), argument(args, 2), argument(args, 4)
        if gain == 0:
            for i in range(0, count, 16):
                store(out + i * 4, load(F32X16, x + i * 4))
            if argument(args, 6) != 0:
                quantize_row(out, argument(args, 5))
            return
        if argument(args, 7) != 0:
            total = splat(F32X16, 0.0)
            for i in range(0, count, 16):
                total = total + load(F32X16, x + i * 4)
            middle = sum_lanes(total) / float32(count)
            whole = count // 16 * 16
            for i in range(0, whole, 16):
                store(out + i * 4, load(F32X16, x + i * 4) - splat(F32X16, middle))
            for i in range(whole, count):
                store_scalar(out + i * 4, float32(load_scalar(float32, x + i * 4) - middle))
            x = out
        squares = splat(F32X16, 0.0)
        for i in range(0, count, 16):
            value = load(F32X16, x + i * 4)
            squares = fma(value, value, squares)
        mean = sum_lanes(squares) / float32(count)
        factor = splat(F32X16, float32(1) / float32(math.sqrt(mean + argument_float(args, 3))))
        for i in range(0, count, 16):
            store(out + i * 4, load(F32X16, x + i * 4) * factor * load(F32X16, gain + i * 4))
        if argument(args, 6) != 0:
            quantize_row(out, argument(args, 5))

    return compile_kernel(norm, features.key)


@cache
def merge_kernel(features: Features) -> Kernel:
    """``out = residual + norm(x) * scale`` [n], all padded with zeros to 16.

    Args: 0 x, 1 gain or 0 (no norm), 2 n, 3 eps (float), 4 scale (float), 5 residual, 6 out. x is overwritten.
    """

    def merge(item, thread, args):
        x, residual, out = argument(args, 0), argument(args, 5), argument(args, 6)
        norm_in_place(x, argument(args, 1), argument(args, 2), argument_float(args, 3), argument_float(args, 4))
        for i in range(0, argument(args, 2), 16):
            store(out + i * 4, load(F32X16, residual + i * 4) + load(F32X16, x + i * 4))

    return compile_kernel(merge, features.key)


@cache
def append_kernel(features: Features, head_dim: int, norms: bool = False) -> Kernel:
    """Rotate q and k [H + Hkv, Dh] (pairs (i, half + i) by an angle) in place; k and v to float16 rows of the cache.
    With ``norms`` q and k are normed before.

    Args: 0 q, k, v f32 [H + 2 Hkv, Dh], 1 H, 2 Hkv, 3 cos, 4 sin [half], 5 half, 6 keys, 7 values, 8 bytes from head to
    head, 9 row; with ``norms`` 10 gain of q, 11 of k (or 0), 12 whether of whole rows, 13 eps, 14 factor of q.
    """

    def append(item, thread, args):
        joint, heads, kv_heads = argument(args, 0), argument(args, 1), argument(args, 2)
        if norms:
            whole_rows, eps = argument(args, 12), argument_float(args, 13)
            norm_heads(joint, argument(args, 10), heads, head_dim, whole_rows, eps, argument_float(args, 14))
            norm_heads(joint + heads * head_dim * 4, argument(args, 11), kv_heads, head_dim, whole_rows, eps, 1.0)
        cos, sin, half = argument(args, 3), argument(args, 4), argument(args, 5)
        whole = half // 16 * 16
        for head in range(heads + kv_heads):
            x = joint + head * head_dim * 4
            for i in range(0, whole, 16):
                c, s = load(F32X16, cos + i * 4), load(F32X16, sin + i * 4)
                a, b = load(F32X16, x + i * 4), load(F32X16, x + (half + i) * 4)
                store(x + i * 4, a * c - b * s)
                store(x + (half + i) * 4, b * c + a * s)
            for i in range(whole, half):
                d, t = load_scalar(float32, cos + i * 4), load_scalar(float32, sin + i * 4)
                e, f = load_scalar(float32, x + i * 4), load_scalar(float32, x + (half + i) * 4)
                store_scalar(x + i * 4, float32(e * d - f * t))
                store_scalar(x + (half + i) * 4, float32(f * d + e * t))
        # Infinite scores would choose keys or leave them out without a word: NaN is seen in the logits.
        spoil(joint, heads * head_dim, 3e38)
        spoil(joint + heads * head_dim * 4, kv_heads * head_dim, 65520.0)
        offset = argument(args, 9) * head_dim * 2
        for head in range(kv_heads):
            for side in range(2):
                x = joint + (heads + side * kv_heads + head) * head_dim * 4
                to = argument(args, 6 + side) + head * argument(args, 8) + offset
                for i in range(0, head_dim, 16):
                    store(to + i * 2, convert(F16X16, load(F32X16, x + i * 4)))

    return compile_kernel(append, f"{features.key}-{head_dim}-{norms}")


@cache
def gate_kernel(features: Features, activation: str = "silu") -> Kernel:
    """``out = act(gate) * up``, rounded to int8. Item: _RECORDS records, padded with zeros.

    Args: 0 gate, 1 up, 2 buffer of activations, 3 padded columns.
    """
    argument_of = activation_argument(activation)

    def activate(item, thread, args):
        gate, up, out, width = argument(args, 0), argument(args, 1), argument(args, 2), argument(args, 3)
        for record in range(item * _RECORDS, min((item + 1) * _RECORDS, width // RECORD)):
            for at in range(record * RECORD * 4, (record + 1) * RECORD * 4, 64):
                value = load(F32X16, gate + at)
                share = splat(F32X16, 1.0) / (splat(F32X16, 1.0) + exp(splat(F32X16, 0.0) - argument_of(value)))
                store(out + at, value * share * load(F32X16, up + at))
            quantize_record(out + record * RECORD * 4, out + width * 4 + record * RECORD_BYTES)

    return compile_kernel(activate, f"{features.key}-{activation}")


class _Layer:
    """The words of one layer's jobs that change from token to token."""

    def __init__(self, append: np.ndarray, attend: np.ndarray, join: np.ndarray, job: int, window: int) -> None:
        self.append, self.attend, self.join = append, attend, join
        self.job = job  # number of the attention's job in the program
        self.window = window  # of the layer, 0: it sees everything
        self._read = (0, 0, 0)  # where keys and values begin, bytes from row to row
        self.store: weakref.ref[np.ndarray] | None = None  # whose address the words hold

    def place(self, store: np.ndarray) -> None:
        """The rows lie in ``store`` [2, Hkv, capacity, Dh]."""
        self.write_to(store)
        self.read_from(*store)
        self.store = weakref.ref(store)

    def write_to(self, store: np.ndarray) -> None:
        """The new row goes to ``store`` [2, Hkv, capacity, Dh]."""
        self.store = None
        keys, values = store
        self.append[6:9] = address(keys), address(values), keys.strides[0]

    def read_from(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Attention reads ``keys``, ``values`` [Hkv, N, Dh]."""
        self._read = address(keys), address(values), keys.strides[1]
        self.attend[1:4] = address(keys), address(values), keys.strides[0]
        self.attend[13] = values.strides[0]

    def read_after(self, skipped: int) -> None:
        """Attention leaves out the first rows of what it reads."""
        keys, values, stride = self._read
        self.attend[1:3] = keys + skipped * stride, values + skipped * stride


class Decoder:
    """The program of one model. One step at a time: callers in other threads wait."""

    def __init__(self, ops: Any, model: Any) -> None:
        """``ops``: a FastOps; ``model``: a Llama on it, its head width a multiple of 16."""
        self.config, self._ops, self._model = model.config, ops, model
        self._lock = threading.Lock()
        after_fork(self, open_lock)
        self._kept: list[Any] = []  # what the program has addresses of
        self._allocate()
        self._program = Program()
        self._layers = [self._add_layer(number, layer) for number, layer in enumerate(model.layers)]
        head = self._rows(model.head)
        self._norm(address(self._hidden), self._vector(model.norm, self.config.d_model), head)
        self._products(self._normed, head, [address(self._logits)], None)

    def _allocate(self) -> None:
        c = self.config
        heads = c.n_heads + 2 * c.n_kv_heads
        self._hidden = self._floats(1, c.d_model)[0]
        self._middle = self._floats(c.n_layers, c.d_model)
        self._logits = self._floats(1, c.vocab_size)[0]
        self._joint = self._floats(1, heads * c.head_dim)[0]
        count = c.experts.used if c.experts else 1
        self._gate, self._up = (self._floats(count, c.d_ff) for _ in range(2))
        self._routed = self._floats(1, c.experts.count if c.experts else 1)[0]
        self._weights = self._floats(1, count)[0]
        self._result = self._floats(1, c.d_model)[0]  # what is normed or scaled before it joins the residual stream
        self._row = np.zeros((2, c.n_kv_heads, 1, c.head_dim), np.float16)  # a key and a value on their way to a cache
        self._angles = self._floats(2 * len(self._model.rope_tables), max(1, c.rope.dims // 2))
        self._normed, self._mixed = (aligned_zeros(1, activation_bytes(n)) for n in (c.d_model, c.n_heads * c.head_dim))
        self._activated = aligned_zeros(count, activation_bytes(c.d_ff))
        most = -(-ITEMS // c.n_kv_heads)  # spans of a layer of any length
        self._partial = aligned_zeros(c.n_heads * most, partial_bytes(c.head_dim))
        self._scratch = aligned_zeros(self._ops.threads, Grouping(c.n_heads // c.n_kv_heads).scratch_bytes(c.head_dim))

    @staticmethod
    def _floats(rows: int, columns: int) -> np.ndarray:
        """Zeros float32 [rows, padded columns] on cache lines."""
        return aligned_zeros(rows, padded(columns) * 4).view(np.float32)

    def _rows(self, weight: Any) -> list[Rows]:
        rows = [Rows.of(part, self._ops.features) for part in weight.parts]
        self._kept += rows
        return rows

    def _vector(self, vector: np.ndarray | None, columns: int) -> int:
        """The address of a gain or bias, 0 for none."""
        if vector is None:
            return 0
        copy = self._floats(1, columns)
        copy[0, :columns] = vector
        self._kept.append(copy)
        return address(copy)

    def _add_layer(self, number: int, layer: Any) -> _Layer:
        c, features, program = self.config, self._ops.features, self._program
        d, hidden, middle, joint = c.d_model, address(self._hidden), address(self._middle[number]), address(self._joint)
        width = c.n_heads * c.head_dim
        qkv, out = self._rows(layer.qkv), self._rows(layer.out)
        self._norm(hidden, self._vector(layer.attn_norm, d), qkv)
        self._products(self._normed, qkv, [joint], layer.qkv_bias)
        head_bytes = c.head_dim * 4
        norms, turns = layer.head_norms, max(0, layer.turns)
        q_gain, k_gain, whole = head_norm_words(norms, c.head_dim)
        append = program.add(
            append_kernel(features, c.head_dim, norms is not None), 1, joint, c.n_heads, c.n_kv_heads,
            address(self._angles[2 * turns]), address(self._angles[2 * turns + 1]),
            c.rope.dims // 2 if layer.turns >= 0 else 0, 0, 0, 0, 0,
            q_gain, k_gain, whole, 0.0 if norms is None else float(norms.eps), 1.0 if norms is None else norms.scale,
        )  # fmt: skip
        attend = program.add(
            attend_kernel(features, c.head_dim, c.n_heads // c.n_kv_heads, c.attention_cap), 0,
            joint, 0, 0, 0, 0, 1, c.n_kv_heads, 0, 0,
            address(self._partial), 0, address(self._scratch), self._scratch.strides[0], 0,
        )  # fmt: skip
        job = len(program) - 1
        rounded = padded(width) if any(rows.format.quantized for rows in out) else 0
        join = program.add(
            join_kernel(features, c.head_dim), 1, address(self._partial), 0, c.n_heads, address(self._mixed),
            c.n_heads * head_bytes, rounded,
        )  # fmt: skip
        # Where feed-forward and attention read one norm, that is made anew: its buffer has the same numbers.
        self._joined(self._mixed, out, middle, layer.out_bias, hidden, layer.attn_merge)
        if layer.experts is not None:
            consumers = [*self._rows(layer.experts.gate_up[0]), *self._rows(layer.experts.router)]
            self._norm(middle, self._vector(layer.ffn_norm, d), consumers)
            self._add_experts(layer, middle, hidden)
            return _Layer(append, attend, join, job, c.window(number))
        gate_up, down = self._rows(layer.gate_up), self._rows(layer.down)
        self._norm(hidden if c.parallel else middle, self._vector(layer.ffn_norm, d), gate_up)
        self._products(self._normed, gate_up, [address(self._gate), address(self._up)], layer.gate_up_bias)
        program.add(
            gate_kernel(features, c.activation), -(-padded(c.d_ff) // (RECORD * _RECORDS)), address(self._gate),
            address(self._up), address(self._activated), padded(c.d_ff),
        )  # fmt: skip
        self._joined(self._activated, down, hidden, layer.down_bias, middle, layer.ffn_merge)
        if c.parallel:  # the state that a boundary keeps is that after the whole layer, as in prefill
            self._copy(hidden, middle)
        return _Layer(append, attend, join, job, c.window(number))

    def _add_experts(self, layer: Any, middle: int, hidden: int) -> None:
        """The router's choice and the chosen experts' feed-forwards, from ``middle`` to ``hidden``; see ``mixture``."""
        c, features, program, experts = self.config, self._ops.features, self._program, layer.experts
        used, count = experts.used, len(experts.down)
        self._products(self._normed, self._rows(experts.router), [address(self._routed)], None)
        gate, up = (Stacked.of(experts.gate_up, part, features) for part in range(2))
        down = Stacked.of(experts.down, 0, features)
        chosen, places = np.zeros(used, np.int64), np.zeros((3 * used, 3), np.int64)
        self._kept += [gate, up, down, chosen, places]
        program.add(
            choose_kernel(features), 1, address(self._routed), count, used, int(experts.normalised),
            address(self._weights), address(chosen), address(places), len(places),
        )  # fmt: skip
        outs = [address(rows[slot]) for rows in (self._gate, self._up) for slot in range(used)]
        words = add_stacked(program, self._ops, address(self._normed), outs, [gate] * used + [up] * used)
        program.add(
            gate_experts_kernel(features, c.activation), gate_items(c.d_ff, used),
            address(self._gate), address(self._up), self._gate.strides[0], address(self._activated),
            self._activated.strides[0], padded(c.d_ff), address(self._weights),
        )  # fmt: skip
        to, before = (address(self._result), 0) if layer.ffn_merge is not None else (hidden, middle)
        for slot in range(used):
            words += add_stacked(program, self._ops, address(self._activated[slot]), [to], [down], before)
            before = to
        if layer.ffn_merge is not None:
            self._merge(layer.ffn_merge, middle, hidden)
        stacks = [gate] * used + [up] * used + [down] * used
        for number, (stack, word) in enumerate(zip(stacks, words, strict=True)):
            places[number] = word, address(stack.places), number % used

    def _copy(self, source: int, to: int) -> None:
        d = self.config.d_model
        self._program.add(norm_kernel(self._ops.features), 1, source, 0, d, 0.0, to, padded(d), 0, 0)

    def _joined(
        self, source: np.ndarray, rows: Sequence[Rows], to: int, bias: np.ndarray | None, residual: int, merge: Any
    ) -> None:
        """A product that joins the residual stream, as ``merge`` says."""
        if merge is None:
            self._products(source, rows, [to], bias, residual)
            return
        self._products(source, rows, [address(self._result)], bias)
        self._merge(merge, residual, to)

    def _merge(self, merge: Any, residual: int, to: int) -> None:
        d = self.config.d_model
        self._program.add(
            merge_kernel(self._ops.features), 1, address(self._result), self._vector(merge.gain, d), d,
            float(merge.eps), float(merge.scale), residual, to,
        )  # fmt: skip

    def _norm(self, x: int, gain: int, consumers: Sequence[Rows]) -> None:
        d = self.config.d_model
        rounds = int(any(rows.format.quantized for rows in consumers))
        self._program.add(
            norm_kernel(self._ops.features), 1,
            x, gain, d, float(self.config.norm_eps), address(self._normed), padded(d), rounds, int(self.config.centred),
        )  # fmt: skip

    def _products(
        self, source: np.ndarray, parts: Sequence[Rows], outs: Sequence[int], bias: np.ndarray | None, residual: int = 0
    ) -> None:
        """Products of one vector with stacked parts: each to an address of its own, or one after the other to one."""
        biases = self._vector(bias, 0 if bias is None else len(bias))
        products, row = [], 0
        for number, rows in enumerate(parts):
            out = outs[number] if len(outs) > 1 else outs[0] + row * 4
            products.append(Product(rows, out, 0, biases + row * 4 if biases else 0, residual))
            row += rows.tensor.shape[0]
        add_products(self._program, self._ops.features, self._ops.threads, address(source), 0, 1, products)

    # -- a token ------------------------------------------------------------------------------------------------------

    def step(
        self, cache: Cache, token: int, position: int, *, middle: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """See ``slimrt.ops.protocol.Decoder``."""
        with self._lock:
            d = self.config.d_model
            for number, (cos, sin) in enumerate(self._model.rope(np.array([position]))[:-1]):
                self._angles[2 * number, : cos.shape[1]] = cos[0]
                self._angles[2 * number + 1, : sin.shape[1]] = sin[0]
            self._hidden[:d] = self._model.embed(np.array([token]))[0]
            rooms: list[Any] = [cache.room(number, 1) for number in range(len(self._layers))]
            if any(room is None for room in rooms):
                self._run_by_layer(cache, position)
            else:
                self._run(cache, rooms, position)
            between = None if middle is None else self._middle[middle, :d][None].copy()
            return self._logits[: self.config.vocab_size].copy(), between

    def _run(self, cache: Cache, rooms: Sequence[np.ndarray], position: int) -> None:
        """All layers in one go: where rows lie and how many there are is known before."""
        at = np.array([position])
        for number, (layer, room) in enumerate(zip(self._layers, rooms, strict=True)):
            if layer.store is None or layer.store() is not room:
                layer.place(room)
            cache.appended(number, at)
            layer.append[9] = cache.length(number) - 1
            self._read(layer, cache.length(number), cache.positions(number) if layer.window else at)
        self._ops.team.run(self._program)

    def _run_by_layer(self, cache: Cache, position: int) -> None:
        """Between the rotation and the attention of each layer the cache says which rows the query reads."""
        c, at, begun = self.config, np.array([position]), 0
        q = self._joint[: c.n_heads * c.head_dim].reshape(1, c.n_heads, c.head_dim)
        k, v = self._row.transpose(0, 2, 1, 3)  # [1, Hkv, Dh] each
        for number, layer in enumerate(self._layers):
            layer.write_to(self._row)
            layer.append[9] = 0
            self._ops.team.run(self._program, begun, layer.job)
            if number:
                cache.attended(number - 1)
            keys, values, held = cache.update(number, k, v, at, q)
            layer.read_from(keys, values)
            self._read(layer, keys.shape[1], held)
            begun = layer.job
        self._ops.team.run(self._program, begun)
        cache.attended(len(self._layers) - 1)

    def _read(self, layer: _Layer, rows: int, held: np.ndarray) -> None:
        """Attention of ``layer`` reads ``rows`` rows, or of those at positions ``held`` the last ones within its
        window: how they are shared out."""
        if layer.window:
            skipped = int(np.searchsorted(held, held[-1] - layer.window + 1))
            layer.read_after(skipped)
            rows -= skipped
        size = spans_for(rows, self.config.n_kv_heads)
        spans = -(-rows // size)
        layer.attend[4] = rows
        layer.attend[7:9] = size, spans
        layer.join[1] = spans
        self._program.table[layer.job, 1] = self.config.n_kv_heads * spans
