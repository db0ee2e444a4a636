"""The arithmetic of a layer but for attention, in plain lines: what every backend computes.

Each part treats every row alone, so it runs in slices (``by_rows``). A backend derives from ``LayerOps`` and may
replace a part by something quicker that means the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slimrt.ops.protocol import Array, Weight

__all__ = ["Activation", "Experts", "HeadNorms", "LayerOps", "Merge", "by_expert", "chosen_experts"]

Activation = Literal["silu", "gelu", "clamped"]


@dataclass(frozen=True)
class HeadNorms:
    """What becomes of queries and keys between projection and rotation: a norm with gains [Dh], of each head alone, or
    [H Dh] and [Hkv Dh], of the whole row; None: no norm. Queries are multiplied with ``scale``."""

    q_gain: Array | None
    k_gain: Array | None
    eps: float
    scale: float = 1.0


@dataclass(frozen=True)
class Merge:
    """How a part's result joins the residual stream: normed with ``gain`` [D] (None: as it is), times ``scale``."""

    gain: Array | None
    eps: float
    scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """The weights of a mixture: ``router`` [E, D], of each expert gate and up stacked [2 F, D] and down [D, F]; a row
    passes the ``used`` experts that its router's softmax makes likeliest, weighed by it (``normalised``: to sum 1).
    Biases, or None: of the router [E], of each expert [2 F] and [D]."""

    router: Weight
    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    used: int
    normalised: bool
    router_bias: Array | None = None
    gate_up_bias: tuple[Array, ...] | None = None
    down_bias: tuple[Array, ...] | None = None

    def biases(self, expert: int) -> tuple[Array | None, Array | None]:
        """Of gate and up, and of down."""
        return tuple(None if part is None else part[expert] for part in (self.gate_up_bias, self.down_bias))  # type: ignore[return-value]


def chosen_experts(logits: np.ndarray, used: int, normalised: bool) -> tuple[np.ndarray, np.ndarray]:
    """Router logits [T, E] float32 -> the chosen experts [T, used], likeliest first, and their weights [T, used]."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = np.argsort(-shares, axis=1, kind="stable")[:, :used]
    weights = np.take_along_axis(shares, chosen, axis=1)
    if normalised:
        weights /= weights.sum(axis=1, keepdims=True)
    return chosen, weights


class LayerOps:
    """For backends with ``rows``, ``whole_rows``, ``empty``, ``rmsnorm``, ``linear``, ``add_linear``, ``rope``,
    ``swiglu`` and ``geglu``; with experts also ``clamped``."""

    def qkv(
        self: Any,
        x: Array,
        gain: Array | None,
        eps: float,
        weight: Weight,
        bias: Array | None,
        cos: Array,
        sin: Array,
        heads: tuple[int, int, int],
        norms: HeadNorms | None = None,
    ) -> tuple[Array, Array, Array]:
        """Norm, stacked projection, RoPE: x [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh], k rotated as well.

        ``heads``: H, Hkv, Dh. The rows of ``weight`` [(H + 2 Hkv) Dh, D] are those of q, k, v. ``gain`` None: no norm
        of x. cos and sin [T, 0]: no rotation.
        """
        count, kv_count, width = heads

        def part(x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
            joint = self.linear(self.normed(x, gain, eps), weight, bias).reshape(len(x), -1, width)
            q, k, v = joint[:, :count], joint[:, count:-kv_count], joint[:, -kv_count:]
            if norms is not None:
                self.norm_heads(q, norms.q_gain, norms.eps)
                self.norm_heads(k, norms.k_gain, norms.eps)
                if norms.scale != 1:
                    self.scale_heads(q, norms.scale)
            if cos.shape[1]:
                self.rope(joint[:, : count + kv_count], cos, sin)  # q and k, in place
            return q, k, v

        return self.by_rows(part, x, cos, sin)

    def project(
        self: Any, x: Array, attention: Array, weight: Weight, bias: Array | None, merge: Merge | None = None
    ) -> Array:
        """Output projection and residual: x [T, D], attention [T, H, Dh] -> x + attention @ weight.T (+ bias)."""

        def part(x: Array, attention: Array) -> tuple[Array]:
            if merge is None:
                return (self.add_linear(x, attention, weight, bias),)
            return (self.merged(x, self.linear(attention, weight, bias), merge),)

        return self.by_rows(part, x, attention.reshape(len(x), -1))[0]

    def feed_forward(
        self: Any,
        x: Array,
        gain: Array | None,
        eps: float,
        gate_up: Weight,
        gate_up_bias: Array | None,
        down: Weight,
        down_bias: Array | None,
        activation: Activation = "silu",
        merge: Merge | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Norm, gated feed-forward, residual: x [T, D] -> x + down(act(gate) * up); gate_up [2 F, D], gate first.

        ``residual`` [T, D] is what the result is added to in the place of x.
        """

        def part(x: Array, residual: Array) -> tuple[Array]:
            hidden = self.gated(self.linear(self.normed(x, gain, eps), gate_up, gate_up_bias), activation)
            if merge is None:
                return (self.add_linear(residual, hidden, down, down_bias),)
            return (self.merged(residual, self.linear(hidden, down, down_bias), merge),)

        return self.by_rows(part, x, x if residual is None else residual)[0]

    def experts(
        self: Any, x: Array, gain: Array, eps: float, experts: Experts, activation: Activation, merge: Merge | None
    ) -> Array:
        """Norm, the chosen experts' feed-forwards, residual: x [T, D] -> x + sum of weight * down(act(gate) * up)."""
        normed, chosen, weights = self.routed(x, gain, eps, experts)
        mixed = x * 0
        ready = self.unpacked if len(x) > 1 else _as_it_is
        for expert, rows, share in by_expert(chosen, weights):
            at, share = self.index(rows), self.index(share)
            bias, down_bias = experts.biases(expert)
            hidden = self.gated(self.linear(normed[at], ready(experts.gate_up[expert]), bias), activation)
            mixed[at] += self.linear(hidden, ready(experts.down[expert]), down_bias) * share[:, None]
        return x + mixed if merge is None else self.merged(x, mixed, merge)

    def routed(self: Any, x: Array, gain: Array, eps: float, experts: Experts) -> tuple[Array, np.ndarray, np.ndarray]:
        """x [T, D] normed, and which experts each row passes with which weights, both [T, used] on the host."""

        def part(x: Array) -> tuple[Array, Array]:
            normed = self.rmsnorm(x, gain, eps)
            return normed, self.linear(normed, experts.router, experts.router_bias)

        normed, logits = self.by_rows(part, x)
        return normed, *chosen_experts(self.to_host(logits).astype(np.float32), experts.used, experts.normalised)

    def index(self, rows: np.ndarray) -> Array:
        """``rows`` where they can index or scale an array of this backend."""
        return rows

    def normed(self: Any, x: Array, gain: Array | None, eps: float) -> Array:
        """x [T, D] as products want it: normed, or as it is."""
        return x if gain is None else self.rmsnorm(x, gain, eps)

    def norm_heads(self, x: Array, gain: Array | None, eps: float) -> None:
        """Norm x [T, heads, Dh] in place, by head or (``gain`` [heads Dh]) by row."""
        if gain is None:
            return
        axes: Any = -1 if len(gain) == x.shape[-1] else (-2, -1)
        wide = x.astype(np.float32)
        wide /= ((wide * wide).mean(axis=axes, keepdims=True) + np.float32(eps)) ** np.float32(0.5)
        x[...] = wide * gain.reshape(-1, x.shape[-1])

    def scale_heads(self, x: Array, by: float) -> None:
        """Multiply x [T, heads, Dh] with ``by``, in place."""
        x[...] = x * np.float32(by)

    def centred(self, x: Array) -> Array:
        """x [T, D] less each row's mean: RMSNorm of it is LayerNorm of x."""
        return x - x.mean(axis=1, keepdims=True)

    def gated(self: Any, gate_up: Array, activation: Activation) -> Array:
        """act(gate) * up; gate_up [T, 2 F] with gate first -> [T, F]."""
        if activation == "clamped":
            return self.clamped(gate_up)
        return self.swiglu(gate_up) if activation == "silu" else self.geglu(gate_up)

    def merged(self: Any, x: Array, y: Array, merge: Merge) -> Array:
        """x [T, D] + y [T, D] as ``merge`` says."""
        if merge.gain is not None:
            y = self.rmsnorm(_wide(y), merge.gain, merge.eps)
        y = _wide(y)
        return x + y * np.float32(merge.scale) if merge.scale != 1 else x + y

    def by_rows(self: Any, part: Callable[..., tuple[Array, ...]], *rows: Array) -> tuple[Array, ...]:
        """``part(*rows)``, where there are many rows in slices of them, as the backend's ``rows`` cuts and runs them.

        ``rows`` and what ``part`` returns have one entry a token in front.
        """
        count = len(rows[0])
        if count <= self.whole_rows:
            return part(*rows)
        whole: list[Array] = []
        lock = threading.Lock()  # slices may run at once

        def run(at: slice) -> None:
            results = part(*(array[at] for array in rows))
            with lock:
                if not whole:
                    whole.extend(self.empty((count, *result.shape[1:]), result.dtype) for result in results)
            for array, result in zip(whole, results, strict=True):
                array[at] = result

        self.rows(run, count)
        return tuple(whole)


def _as_it_is(weight: Weight) -> Weight:
    """For one row: reading the packed matrix is quicker than unpacking it."""
    return weight


def _wide(x: Array) -> Array:
    """``x`` as float32."""
    return x if x.dtype == np.float32 else x.astype(np.float32)


def by_expert(chosen: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of experts [T, used] and their weights each expert once, with the rows that pass it and their weights."""
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(flat.max() + 2))
    for expert in np.unique(flat).tolist():
        entries = order[bounds[expert] : bounds[expert + 1]]
        yield expert, entries // chosen.shape[1], weights.reshape(-1)[entries]
