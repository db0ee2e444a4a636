"""Tokens through all layers as one program of the team: no interpreter between the products.

Per layer, each line a job that begins when the one before has ended, its items in brackets:

    norm, rounded to int8          (tokens)
    q, k, v                        (rows of the matrices)
    rotate q and k, append k and v (tokens)
    attention                      (KV heads x spans of keys x tokens)
    join the spans, round to int8  (tokens)
    output projection + residual   (rows)
    norm, rounded to int8          (tokens)
    gate, up                       (rows)
    act(gate) * up, rounded        (records x tokens)
    down + residual                (rows)

Norms behind a part and multipliers of the residual stream are a job more. With experts the router's product and the
choice come before gate and up, and the choice writes into the arguments of the products behind it which matrices they
read (``mixture.py``).

Behind the last layer stand a norm and the head. The residual stream goes from ``hidden`` to the layer's row of
``middle`` (after attention) and back to ``hidden``. What changes from step to step are a few words of the jobs'
arguments: how many rows a layer holds, and where they lie. Under a KV budget the cache chooses what each query reads:
there the program halts before every attention, which then runs for one token after the other.

Several tokens that follow each other, and those of several conversations, pass together where that can be: the weights
are read and unpacked once for them. Every job does for each of them what it would do for it alone, in the same order,
so the bits are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.ops.adapted import Delta
from slimrt.ops.fast.activations import activation_bytes, padded
from slimrt.ops.fast.adapted_products import AdaptedProducts, base_of, deltas_of
from slimrt.ops.fast.attend_few import SEEN, Grouping, attend_kernel, join_kernel, most_spans, partial_bytes, spans_for
from slimrt.ops.fast.decode_kernels import PLACE, append_kernel, gate_items, gate_kernel, merge_kernel, norm_kernel
from slimrt.ops.fast.decode_places import LayerPlaces
from slimrt.ops.fast.gemv import VECTORS, Product, Rows, add_products, aligned_zeros, gemv_kernel, gemv_scratch
from slimrt.ops.fast.kernels import Kernel
from slimrt.ops.fast.layer_kernels import head_norm_words
from slimrt.ops.fast.mixture import Stacked, add_biases_kernel, add_stacked, choose_kernel
from slimrt.ops.fast.team import Program, address
from slimrt.ops.forks import after_fork, open_lock
from slimrt.ops.protocol import Part

__all__ = ["Decoder"]


# Tokens of a pass: each adds the jobs of its experts to every layer, and saves little.
_MOST_WITH_EXPERTS = 4


class Decoder:
    """The program of one model. One step at a time: callers in other threads wait."""

    def __init__(self, ops: Any, model: Any) -> None:
        """``ops``: a FastOps; ``model``: a Llama on it, its head width a multiple of 16."""
        self.config, self._ops, self._model = model.config, ops, model
        self._lock = threading.Lock()
        after_fork(self, open_lock)
        self._kept: list[Any] = []  # what the program has addresses of
        self.most = _MOST_WITH_EXPERTS if self.config.experts else VECTORS
        self._allocate()
        self._program = Program()
        self._by_token: list[int] = []  # jobs with so many items for each token
        self._of_row: list[tuple[int, slice]] = []  # jobs of one token alone
        self._gemvs: list[tuple[int, Any, np.ndarray]] = []  # of each product: its job, type, arguments
        self._adapted = AdaptedProducts(ops.features, self.most, self._add_products)
        self._layers = [self._add_layer(number, layer) for number, layer in enumerate(model.layers)]
        head = self._rows(model.head)
        self._norm(self._hidden, self._vector(model.norm, self.config.d_model), head)
        self._products(self._normed, head, [self._logits], None)
        self._table, self._tokens = self._program.table, 0
        self._items = self._table[:, 1].copy()
        self._jobs = np.array([layer.job for layer in self._layers])

    def _allocate(self) -> None:
        c, most = self.config, self.most
        heads = c.n_heads + 2 * c.n_kv_heads
        self._hidden = self._floats(most, c.d_model)
        self._middle = self._floats(c.n_layers * most, c.d_model).reshape(c.n_layers, most, -1)
        self._logits = self._floats(most, c.vocab_size)
        self._joint = self._floats(most, heads * c.head_dim)
        count = c.experts.used if c.experts else most
        self._gate, self._up = (self._floats(count, c.d_ff) for _ in range(2))
        self._routed = self._floats(most, c.experts.count if c.experts else 1)
        self._weights = self._floats(1, count)
        self._result = self._floats(most, c.d_model)  # what is normed or scaled before it joins the residual stream
        # Keys and values on their way to a cache that chooses.
        self._row = np.zeros((2, c.n_kv_heads, most, c.head_dim), np.float16)
        tables = 2 * len(self._model.rope_tables)  # cos and sin of each
        self._angles = self._floats(tables * most, max(1, c.rope.dims // 2)).reshape(tables, most, -1)
        self._normed, self._mixed = (
            aligned_zeros(most, activation_bytes(n)) for n in (c.d_model, c.n_heads * c.head_dim)
        )
        self._activated = aligned_zeros(count, activation_bytes(c.d_ff))
        # What each token sees in each layer, see ``attend_few``; how many spans of keys that are, at most.
        self._seen, self._spans = np.zeros((c.n_layers, most, SEEN), np.int64), np.zeros(c.n_layers, np.int64)
        self._places = np.zeros((c.n_layers, most, PLACE), np.int64)
        self._growth = self._places.view(np.float64)[:, :, 4]  # of each token's queries
        self._growth[...] = 1
        self._room = most_spans(c.n_kv_heads)
        self._partial = aligned_zeros(most * c.n_heads * self._room, partial_bytes(c.head_dim))
        self._sums = gemv_scratch(self._ops.threads)
        self._scratch = aligned_zeros(self._ops.threads, Grouping(c.n_heads // c.n_kv_heads).scratch_bytes(c.head_dim))

    @staticmethod
    def _floats(rows: int, columns: int) -> np.ndarray:
        """Zeros float32 [rows, padded columns] on cache lines."""
        return aligned_zeros(rows, padded(columns) * 4).view(np.float32)

    def _rows(self, weight: Any) -> list[Rows]:
        rows = [Rows.of(part, self._ops.features) for part in base_of(weight).parts]
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

    def _add_layer(self, number: int, layer: Any) -> LayerPlaces:
        c, features, program = self.config, self._ops.features, self._program
        d, hidden, middle, joint = c.d_model, self._hidden, self._middle[number], self._joint
        width, heads = c.n_heads * c.head_dim, c.n_heads + 2 * c.n_kv_heads
        qkv, out = self._rows(layer.qkv), self._rows(layer.out)
        self._norm(hidden, self._vector(layer.attn_norm, d), qkv)
        self._products(self._normed, qkv, [joint], layer.qkv_bias)
        self._adapted.add(self._normed, deltas_of(layer.qkv), [(heads * c.head_dim, joint)])
        norms, turns = layer.head_norms, max(0, layer.turns)
        q_gain, k_gain, whole = head_norm_words(norms, c.head_dim)
        self._each(
            append_kernel(features, c.head_dim, norms is not None), 1, address(joint), c.n_heads, c.n_kv_heads,
            address(self._angles[2 * turns]), address(self._angles[2 * turns + 1]),
            c.rope.dims // 2 if layer.turns >= 0 else 0, address(self._places[number]), joint.strides[0],
            self._angles.strides[1],
            q_gain, k_gain, whole, 0.0 if norms is None else float(norms.eps), 1.0 if norms is None else norms.scale,
        )  # fmt: skip
        attend = program.add(
            attend_kernel(features, c.head_dim, c.n_heads // c.n_kv_heads, c.attention_cap), 0,
            address(joint), joint.strides[0], address(self._seen[number]), 1, c.n_kv_heads, 0, self._room,
            address(self._partial), 0, address(self._scratch), self._scratch.strides[0],
        )  # fmt: skip
        changing = LayerPlaces(self._places[number], self._seen[number], attend, len(program) - 1, c.window(number))
        rounded = padded(width) if any(rows.format.quantized for rows in out) else 0
        self._each(
            join_kernel(features, c.head_dim), 1, address(self._partial), self._room, c.n_heads, address(self._mixed),
            self._mixed.strides[0], rounded, address(self._seen[number]),
            self._vector(self._model.sinks[number], c.n_heads) if c.sinks else 0,
        )  # fmt: skip
        # Where feed-forward and attention read one norm, that is made again: its buffer has the same numbers.
        deltas = deltas_of(layer.out)
        self._joined(self._mixed, out, deltas, middle, layer.out_bias, hidden, layer.attn_merge)
        if layer.experts is not None:
            consumers = [*self._rows(layer.experts.gate_up[0]), *self._rows(layer.experts.router)]
            self._norm(middle, self._vector(layer.ffn_norm, d), consumers)
            self._add_experts(layer, middle, hidden)
            return changing
        gate_up, down = self._rows(layer.gate_up), self._rows(layer.down)
        self._norm(hidden if c.parallel else middle, self._vector(layer.ffn_norm, d), gate_up)
        self._products(self._normed, gate_up, [self._gate, self._up], layer.gate_up_bias)
        self._adapted.add(self._normed, deltas_of(layer.gate_up), [(c.d_ff, self._gate), (c.d_ff, self._up)])
        self._each(
            gate_kernel(features, c.activation), gate_items(c.d_ff), address(self._gate), address(self._up),
            self._gate.strides[0], address(self._activated), self._activated.strides[0], padded(c.d_ff), 0,
        )  # fmt: skip
        deltas = deltas_of(layer.down)
        self._joined(self._activated, down, deltas, hidden, layer.down_bias, middle, layer.ffn_merge)
        if c.parallel:  # the state that a boundary keeps is that after the whole layer, as in prefill
            self._copy(hidden, middle)
        return changing

    def _add_experts(self, layer: Any, middle: np.ndarray, hidden: np.ndarray) -> None:
        """The router's choice and the chosen experts' feed-forwards, from ``middle`` to ``hidden``; see ``mixture``."""
        c, features, program, experts = self.config, self._ops.features, self._program, layer.experts
        used, count = experts.used, len(experts.down)
        self._products(self._normed, self._rows(experts.router), [self._routed], experts.router_bias)
        gate, up = (Stacked.of(experts.gate_up, part, features, experts.gate_up_bias) for part in range(2))
        down = Stacked.of(experts.down, 0, features)
        self._kept += [gate, up, down]
        stacks = [gate] * used + [up] * used + [down] * used
        outs = [address(rows[slot]) for rows in (self._gate, self._up) for slot in range(used)]
        biases = None
        if experts.down_bias is not None:
            # Not by the products: what they multiply is weighed already, and so must the biases be.
            biases = np.array([[0, 0, self._vector(bias, c.d_model)] for bias in experts.down_bias], np.int64)
            self._kept.append(biases)
        for row in range(self.most):  # each token reads matrices of its own
            begun, chosen, places = len(program), np.zeros(used, np.int64), np.zeros((3 * used, 3), np.int64)
            self._kept += [chosen, places]
            program.add(
                choose_kernel(features), 1, address(self._routed[row]), count, used, int(experts.normalised),
                address(self._weights), address(chosen), address(places), len(places),
            )  # fmt: skip
            words = add_stacked(program, self._ops, address(self._normed[row]), outs, stacks[: 2 * used])
            program.add(
                gate_kernel(features, c.activation), used * gate_items(c.d_ff),
                address(self._gate), address(self._up), self._gate.strides[0], address(self._activated),
                self._activated.strides[0], padded(c.d_ff), address(self._weights),
            )  # fmt: skip
            to, before = address(hidden[row]), address(middle[row])
            if layer.ffn_merge is not None:
                to, before = address(self._result[row]), 0
            if biases is not None:
                program.add(
                    add_biases_kernel(features), 1, before, to, c.d_model, address(self._weights), address(chosen),
                    used, address(biases),
                )  # fmt: skip
                before = to
            for slot in range(used):
                words += add_stacked(program, self._ops, address(self._activated[slot]), [to], [down], before)
                before = to
            for number, (stack, word) in enumerate(zip(stacks, words, strict=True)):
                places[number] = word, address(stack.places), number % used
            self._of_row.append((row, slice(begun, len(program))))
        if layer.ffn_merge is not None:
            self._merge(layer.ffn_merge, middle, hidden)

    def _each(self, kernel: Kernel, items: int, *args: int | float) -> np.ndarray:
        """Add a job that has ``items`` for each token."""
        self._by_token.append(len(self._program))
        return self._program.add(kernel, items, *args)

    def _copy(self, source: np.ndarray, to: np.ndarray) -> None:
        d = self.config.d_model
        self._each(
            norm_kernel(self._ops.features), 1, address(source), 0, d, 0.0, address(to), padded(d), 0, 0,
            source.strides[0], to.strides[0],
        )  # fmt: skip

    def _joined(
        self,
        source: np.ndarray,
        rows: Sequence[Rows],
        deltas: Sequence[Delta],
        to: np.ndarray,
        bias: np.ndarray | None,
        residual: np.ndarray,
        merge: Any,
    ) -> None:
        """A product that joins the residual stream, as ``merge`` says."""
        out = to if merge is None else self._result
        self._products(source, rows, [out], bias, address(residual) if merge is None else 0)
        self._adapted.add(source, deltas, [(self.config.d_model, out)])
        if merge is not None:
            self._merge(merge, residual, to)

    def _merge(self, merge: Any, residual: np.ndarray, to: np.ndarray) -> None:
        d = self.config.d_model
        assert self._result.strides[0] == residual.strides[0] == to.strides[0]
        self._each(
            merge_kernel(self._ops.features), 1, address(self._result), self._vector(merge.gain, d), d,
            float(merge.eps), float(merge.scale), address(residual), address(to), to.strides[0],
        )  # fmt: skip

    def _norm(self, x: np.ndarray, gain: int, consumers: Sequence[Rows]) -> None:
        c, normed = self.config, self._normed
        rounds = int(any(rows.format.quantized for rows in consumers))
        self._each(
            norm_kernel(self._ops.features), 1, address(x), gain, c.d_model, float(c.norm_eps), address(normed),
            padded(c.d_model), rounds, int(c.centred), x.strides[0], normed.strides[0],
        )  # fmt: skip

    def _products(
        self,
        source: np.ndarray,
        parts: Sequence[Rows],
        outs: Sequence[np.ndarray],
        bias: np.ndarray | None,
        residual: int = 0,
    ) -> None:
        """Products of ``source`` with stacked parts: each to an array of its own, or one after the other to one."""
        biases = self._vector(bias, 0 if bias is None else len(bias))
        products, row = [], 0
        for number, rows in enumerate(parts):
            out = address(outs[number]) if len(outs) > 1 else address(outs[0]) + row * 4
            products.append(Product(rows, out, outs[0].strides[0], biases + row * 4 if biases else 0, residual))
            row += rows.tensor.shape[0]
        self._add_products(address(source), source.strides[0], products)

    def _add_products(self, source: int, distance: int, products: Sequence[Product]) -> None:
        """Jobs for products of the vectors at ``source``, ``distance`` bytes apart."""
        job = len(self._program)
        added = add_products(
            self._program, self._ops.features, self._ops.threads, source, distance, 1, products, self._sums
        )  # fmt: skip
        self._gemvs += [(job + at, same[0].rows.format.kind, words) for at, (words, same) in enumerate(added)]

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self, parts: Sequence[Part]) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """See ``slimrt.ops.protocol.Decoder``."""
        with self._lock:
            d, layers = self.config.d_model, range(len(self._layers))
            at = np.concatenate([np.arange(part.position, part.position + len(part.tokens)) for part in parts])
            count = len(at)
            rooms: list[Any] = [[part.cache.room(number, len(part.tokens)) for number in layers] for part in parts]
            chooses = any(room is None for rooms_of_one in rooms for room in rooms_of_one)
            self._for_tokens(count)
            for number, (cos, sin) in enumerate(self._model.rope(at)[:-1]):
                self._angles[2 * number, :count, : cos.shape[1]] = cos
                self._angles[2 * number + 1, :count, : sin.shape[1]] = sin
            growth = self._model.growth(at)
            self._growth[:, :count] = 1 if growth is None else growth
            self._hidden[:count, :d] = self._model.embed(np.concatenate([part.tokens for part in parts]))
            if chooses:
                self._run_by_layer(parts, at)
            else:
                self._run(parts, rooms)
            between, first = [], 0
            for part in parts:
                rows = slice(first, first + len(part.tokens))
                between.append(None if part.middle is None else self._middle[part.middle, rows, :d].copy())
                first = rows.stop
            return self._logits[:count, : self.config.vocab_size].copy(), between

    def _for_tokens(self, count: int) -> None:
        """Make the program one for so many tokens."""
        if count == self._tokens:
            return
        assert 1 <= count <= self.most
        # Nobody's until all is changed: a Ctrl-C or a fork may come in between, most likely while a kernel is compiled.
        self._tokens = 0
        self._table[self._by_token, 1] = self._items[self._by_token] * count
        for row, jobs in self._of_row:
            self._table[jobs, 1] = self._items[jobs] if row < count else 0
        features = self._ops.features
        for job, kind, words in self._gemvs:
            words[3] = count
            self._table[job, 0] = gemv_kernel(features, kind, several=count > 1).address
        for layer in self._layers:
            layer.attend[3] = count
        self._tokens = count

    def _run(self, parts: Sequence[Part], rooms: Sequence[Sequence[np.ndarray]]) -> None:
        """All layers in one go: where rows lie and how many there are is known before."""
        first = 0
        for part, stores in zip(parts, rooms, strict=True):
            rows, cache = slice(first, first + len(part.tokens)), part.cache
            own = np.arange(len(part.tokens))
            held = np.array([cache.length(number) for number in range(len(stores))])
            for number, (layer, store) in enumerate(zip(self._layers, stores, strict=True)):
                layer.place(rows, store)
                cache.appended(number, part.position + own)
                if layer.window:
                    layer.skip(rows, cache.positions(number), held[number])
            self._places[:, rows, 3] = held[:, None] + own
            self._seen[:, rows, 0] = held[:, None] + own + 1
            first = rows.stop
        self._share()
        self._ops.team.run(self._program)

    def _run_by_layer(self, parts: Sequence[Part], at: np.ndarray) -> None:
        """Between the rotation and the attention of each layer the caches say which rows each query reads."""
        c, begun, count = self.config, 0, len(at)
        q = self._joint[:count, : c.n_heads * c.head_dim].reshape(count, c.n_heads, c.head_dim)
        k, v = self._row.transpose(0, 2, 1, 3)  # [most, Hkv, Dh] each
        caches = [part.cache for part in parts for _ in part.tokens]
        for number, layer in enumerate(self._layers):
            layer.write_to(slice(0, count), self._row)
            layer.places[:count, 3] = np.arange(count)
            self._ops.team.run(self._program, begun, layer.job)
            if number:
                self._attended(parts, number - 1)
            for row, cache in enumerate(caches):
                if row:  # an update may move what the row before reads
                    self._ops.team.run(self._program, layer.job, layer.job + 1)
                alone = slice(row, row + 1)
                keys, values, held = cache.update(number, k[alone], v[alone], at[alone], q[alone])
                layer.read_from(alone, keys, values)
                self._seen[number, row, 0] = keys.shape[1]
                if layer.window:
                    layer.skip(alone, held, keys.shape[1] - 1)
                self._attend_alone(number, row)
            begun = layer.job
        self._ops.team.run(self._program, begun)
        self._attended(parts, len(self._layers) - 1)

    @staticmethod
    def _attended(parts: Sequence[Part], number: int) -> None:
        for part in parts:
            part.cache.attended(number)

    def _attend_alone(self, number: int, row: int) -> None:
        """Make the attention of a layer one of a single row."""
        words, heads = self._layers[number].attend, self.config.n_kv_heads
        seen = self._seen[number, row]
        rows = seen[0] - seen[1]
        seen[2] = spans_for(rows, heads)
        spans = int(-(-rows // seen[2]))
        words[0] = address(self._joint) + row * self._joint.strides[0]
        words[2], words[3], words[5] = address(seen), 1, spans
        words[7] = address(self._partial) + row * self.config.n_heads * self._room * self._partial.strides[0]
        self._spans[number] = spans
        self._table[self._layers[number].job, 1] = spans * heads

    def _share(self) -> None:
        """How the keys that the tokens see are shared out."""
        count, kv_heads = self._tokens, self.config.n_kv_heads
        seen = self._seen[:, :count]
        rows = seen[..., 0] - seen[..., 1]
        seen[..., 2] = spans_for(rows, kv_heads)
        spans = (-(-rows // seen[..., 2])).max(axis=1)
        for number in np.flatnonzero(spans != self._spans).tolist():
            self._layers[number].attend[5] = self._spans[number] = spans[number]
        self._table[self._jobs, 1] = spans * (kv_heads * count)
