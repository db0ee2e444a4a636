"""The layer of all families on one screen; ``families/`` says which of its parts a family has.

One layer, from hidden states x [T, D] to the next layer's:

    q, k, v = heads(linear(norm(x), W_qkv))          qkv           norms of heads; rope turns q and k by their positions
    a = softmax(q K.T / sqrt(Dh)) V                  the engine    K, V: the cache's, with k and v in it
    x = x + linear(a, W_out)                         project
    x = x + linear(act(gate) * up, W_down)           feed_forward  gate, up = linear(norm(x), W_gate_up), or of experts

A norm may also stand behind ``linear`` (``Merge``), a multiplier too. The lines of ``qkv``, ``project`` and
``feed_forward`` stand in ``slimrt.ops.layer``, where a backend may have something quicker in their place. Each treats
every row alone, so the engine may cut the rows as it likes; positions come in as angles, because after pruning rows are
not contiguous.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from slimrt.config import ModelConfig
from slimrt.models.adapters import Adapter, adapted_layers, adapters_name
from slimrt.models.loader import Loader
from slimrt.models.rope import RopeTable
from slimrt.models.stream import StreamedLayers
from slimrt.ops.adapted import AdaptedOps
from slimrt.ops.layer import Experts, HeadNorms, Merge
from slimrt.ops.protocol import Array, Ops, StreamingOps, Weight
from slimrt.weights.gguf import GGUFFile

Turns = tuple[tuple[Array, Array], ...]

# Without a bias, a key is a product of factors that were rounded to bfloat16, and its magnitude is some units: rounding
# it once more costs as much again. A bias is added in float32, and one above this (Qwen2.5 has some hundreds) is the
# larger part of the key: rounding it costs much more than the product did.
_LARGE_BIAS = 16.0


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices are [out, in] handles of the backend, the rest are vectors or None.

    ``turns``: which of ``Llama.rope``'s angles turn it. ``experts`` stand in the place of ``gate_up`` and ``down``.
    """

    attn_norm: Array | None  # [D]
    qkv: Weight  # [(H + 2 Hkv) Dh, D]
    qkv_bias: Array | None
    out: Weight  # [D, H Dh]
    out_bias: Array | None
    ffn_norm: Array | None  # [D]
    gate_up: Weight | None  # [2 F, D]
    gate_up_bias: Array | None
    down: Weight | None  # [D, F]
    down_bias: Array | None
    head_norms: HeadNorms | None = None
    attn_merge: Merge | None = None
    ffn_merge: Merge | None = None
    experts: Experts | None = None
    turns: int = 0


class Llama:
    """Weights of one model on one backend, and the arithmetic of a layer."""

    def __init__(
        self,
        config: ModelConfig,
        file: GGUFFile,
        ops: Ops,
        progress: Callable[[int, int], None] | None = None,
        *,
        stream: bool = False,
    ) -> None:
        self.config, self.ops, self.streamed = config, ops, stream
        matrix = cast(StreamingOps, ops).host_weight if stream else ops.weight
        load = Loader(config, file, ops, matrix)
        load.check_names()
        embedding = load.checked("token_embd.weight", config.vocab_size, config.d_model)
        self.embedding = ops.weight(embedding)

        def layers() -> Iterator[Layer]:
            for number in range(config.n_layers):
                yield Layer(**load.layer(number))
                if progress:
                    progress(number + 1, config.n_layers)

        self.layers: list[Layer] | StreamedLayers = (
            StreamedLayers(cast(StreamingOps, ops), layers()) if stream else list(layers())
        )
        self._plain = self.layers
        self._rows: Any = ops  # what computes the row-wise parts
        self.adapters = ""  # which adapters are applied: a name that no other choice of them has; empty: none
        # Layers whose keys bfloat16 would round by more than it rounds the products that they are sums of.
        self.large_keys = frozenset(
            number for number in range(config.n_layers) if load.largest_key_bias(number) > _LARGE_BIAS
        )
        # A score more in the softmax of each head [H], whose weight goes to no value; of each layer, or of none.
        self.sinks = [load.sinks(number) for number in range(config.n_layers)] if config.sinks else []
        self.norm = load.vector("output_norm.weight", config.d_model)
        tied = "output.weight" not in file.tensors
        self.head = (
            self.embedding if tied else ops.weight(load.checked("output.weight", config.vocab_size, config.d_model))
        )
        self.rope_tables = [RopeTable(config.rope, load.rope_divisors())]
        if config.local_rope is not None:
            self.rope_tables.append(RopeTable(config.local_rope))

    def adapt(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Apply ``adapters``, each times its scale, from the next pass on, in place of what was applied; a CPU
        backend's model only."""
        if not adapters:
            self.layers, self._rows, self.adapters = self._plain, self.ops, ""
            return
        assert not self.streamed
        self.layers, self._rows = adapted_layers(cast(list[Layer], self._plain), adapters), AdaptedOps(self.ops)
        self.adapters = adapters_name(adapters)

    def embed(self, ids: Array) -> Array:
        """ids [T] -> hidden states [T, D]."""
        x = self.ops.embed(self.embedding, ids)
        return x if self.config.embedding_scale == 1 else x * np.float32(self.config.embedding_scale)

    def rope(self, positions: np.ndarray) -> Turns:
        """positions [T] -> cos and sin [T, dims/2] of their angles, where the model computes: of each table, and last
        those of no rotation [T, 0]."""
        turns = [self.ops.angles(table, positions) for table in self.rope_tables]
        none = turns[0][0][:, :0]
        return (*turns, (none, none))

    def growth(self, positions: np.ndarray) -> np.ndarray | None:
        """What queries at ``positions`` [T] are multiplied with, float32 [T], or None for nothing."""
        if self.config.query_growth is None or positions.max(initial=0) < self.config.query_growth[1]:
            return None
        by, every = self.config.query_growth
        return (1 + by * np.log(1 + positions // every)).astype(np.float32)

    def grown(self, q: Array, positions: np.ndarray) -> Array:
        """Rotated queries q [T, H, Dh] at ``positions`` [T], as attention wants them."""
        growth = self.growth(positions)
        return q if growth is None else q * growth[:, None, None]

    def moved(self, q: Array, by: np.ndarray, layer: int) -> Array:
        """Queries q [T, H, Dh] of ``layer``, as they would be ``by`` [T] positions later; a copy."""
        turns = self.config.turns[layer] if self.config.turns else 0
        moved = np.empty_like(q)
        moved[...] = q
        if turns < 0:
            return moved
        table = copy.copy(self.rope_tables[turns])
        table.gain = 1.0  # YaRN's is in q already
        return self.ops.rope(moved, *self.ops.angles(table, by))

    def unpacked(self, layer: Layer) -> Layer:
        """``layer`` with its matrices ready for many rows (a scratch copy where they are held packed); experts are made
        ready one by one."""
        ready = self._rows.unpacked
        dense = {} if layer.experts else {"gate_up": ready(layer.gate_up), "down": ready(layer.down)}
        return Layer(**{**vars(layer), "qkv": ready(layer.qkv), "out": ready(layer.out), **dense})

    def qkv(self, layer: Layer, x: Array, turns: Turns) -> tuple[Array, Array, Array]:
        """x [T, D] -> rotated q [T, H, Dh], rotated k and v [T, Hkv, Dh]."""
        c = self.config
        heads = c.n_heads, c.n_kv_heads, c.head_dim
        x = self.ops.centred(x) if c.centred else x
        q, k, v = self._rows.qkv(
            x, layer.attn_norm, c.norm_eps, layer.qkv, layer.qkv_bias, *turns[layer.turns], heads, layer.head_norms
        )
        return q, k, v

    def project(self, layer: Layer, x: Array, attention: Array) -> Array:
        """x [T, D] and attention [T, H, Dh] -> x after the output projection and its residual [T, D]; where the
        feed-forward reads what attention reads, it is in the result as well."""
        joined = self._rows.project(x, attention, layer.out, layer.out_bias, layer.attn_merge)
        return (
            self._fed(layer, self.ops.centred(x) if self.config.centred else x, joined)
            if self.config.parallel
            else joined
        )

    def feed_forward(self, layer: Layer, x: Array) -> Array:
        """x [T, D] after ``project`` -> x after the gated feed-forward and its residual [T, D]."""
        return x if self.config.parallel else self._fed(layer, x, None)

    def _fed(self, layer: Layer, x: Array, residual: Array | None) -> Array:
        c = self.config
        if layer.experts is not None:
            return self._rows.experts(x, layer.ffn_norm, c.norm_eps, layer.experts, c.activation, layer.ffn_merge)
        return self._rows.feed_forward(
            x, layer.ffn_norm, c.norm_eps, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias,
            c.activation, layer.ffn_merge, residual,
        )  # fmt: skip

    def normed(self, x: Array) -> Array:
        """Hidden states [T, D] after the last layer -> the same behind the output norm."""
        x = self.ops.centred(x) if self.config.centred else x
        return self.ops.rmsnorm(x, self.norm, self.config.norm_eps)

    def logits(self, x: Array) -> Array:
        """Hidden states [T, D] after the last layer -> [T, V]."""
        return self.ops.head(self.normed(x), self.head)

    def finished(self, logits: np.ndarray) -> np.ndarray:
        """Logits [T, V] on the host -> scaled and capped, in place."""
        c = self.config
        if c.logit_scale != 1:
            logits *= np.float32(c.logit_scale)
        if c.logit_cap:
            logits /= np.float32(c.logit_cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(c.logit_cap)
        return logits
