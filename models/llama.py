"""The LLaMA family on one screen: LLaMA 1-3.2, SmolLM2, TinyLlama, Mistral; Qwen2 (QKV bias, other RoPE layout).

One layer, from hidden states x [T, D] to the next layer's:

    q, k, v = heads(linear(rmsnorm(x), W_qkv))       qkv           rope turns q and k by the angles of their positions
    a = softmax(q K.T / sqrt(Dh)) V                  the engine    K, V: the cache's, with k and v in it
    x = x + linear(a, W_out)                         project
    x = x + linear(swiglu(linear(rmsnorm(x), W_gate_up)), W_down)  feed_forward

The lines of ``qkv``, ``project`` and ``feed_forward`` stand in ``slimrt.ops.layer``, where a backend may have something
quicker in their place. Each treats every row alone, so the engine may cut the rows as it likes; positions come in as
angles, because after pruning rows are not contiguous.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from slimrt.config import ModelConfig
from slimrt.errors import ModelFileError
from slimrt.models.rope import RopeTable
from slimrt.models.stream import StreamedLayers
from slimrt.ops.protocol import Array, Ops, StreamingOps, Weight
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.quants import check_readable, dequantize


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; matrices are [out, in] handles of the backend, the rest are vectors or None."""

    attn_norm: Array  # [D]
    qkv: Weight  # [(H + 2 Hkv) Dh, D]
    qkv_bias: Array | None
    out: Weight  # [D, H Dh]
    out_bias: Array | None
    ffn_norm: Array  # [D]
    gate_up: Weight  # [2 F, D]
    gate_up_bias: Array | None
    down: Weight  # [D, F]
    down_bias: Array | None


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
        load = _Loader(config, file, ops, matrix)
        embedding = load.checked("token_embd.weight", config.vocab_size, config.d_model)
        self.embedding = ops.weight(embedding)

        def layers() -> Iterator[Layer]:
            for number in range(config.n_layers):
                yield load.layer(number)
                if progress:
                    progress(number + 1, config.n_layers)

        self.layers: list[Layer] | StreamedLayers = (
            StreamedLayers(cast(StreamingOps, ops), layers()) if stream else list(layers())
        )
        self.norm = load.vector("output_norm.weight", config.d_model)
        tied = "output.weight" not in file.tensors
        self.head = (
            self.embedding if tied else ops.weight(load.checked("output.weight", config.vocab_size, config.d_model))
        )
        self.rope_table = RopeTable(config.rope, load.rope_divisors())

    def embed(self, ids: Array) -> Array:
        """ids [T] -> hidden states [T, D]."""
        return self.ops.embed(self.embedding, ids)

    def rope(self, positions: np.ndarray) -> tuple[Array, Array]:
        """positions [T] -> cos and sin [T, dims/2] of their angles, where the model computes."""
        return self.ops.angles(self.rope_table, positions)

    def moved(self, q: Array, by: np.ndarray) -> Array:
        """Rotated queries q [T, H, Dh], as they would be ``by`` [T] positions later; a copy."""
        table = copy.copy(self.rope_table)
        table.gain = 1.0  # YaRN's is in q already
        moved = np.empty_like(q)
        moved[...] = q
        return self.ops.rope(moved, *self.ops.angles(table, by))

    def unpacked(self, layer: Layer) -> Layer:
        """``layer`` with its matrices ready for many rows (a scratch copy where they are held packed)."""
        ready = self.ops.unpacked
        return Layer(
            **{
                **vars(layer),
                "qkv": ready(layer.qkv),
                "out": ready(layer.out),
                "gate_up": ready(layer.gate_up),
                "down": ready(layer.down),
            }
        )

    def qkv(self, layer: Layer, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """x [T, D] -> rotated q [T, H, Dh], rotated k and v [T, Hkv, Dh]."""
        c = self.config
        heads = c.n_heads, c.n_kv_heads, c.head_dim
        return self.ops.qkv(x, layer.attn_norm, c.norm_eps, layer.qkv, layer.qkv_bias, cos, sin, heads)

    def project(self, layer: Layer, x: Array, attention: Array) -> Array:
        """x [T, D] and attention [T, H, Dh] -> x after the output projection and its residual [T, D]."""
        return self.ops.project(x, attention, layer.out, layer.out_bias)

    def feed_forward(self, layer: Layer, x: Array) -> Array:
        """x [T, D] after ``project`` -> x after the gated feed-forward and its residual [T, D]."""
        eps = self.config.norm_eps
        return self.ops.feed_forward(
            x, layer.ffn_norm, eps, layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias
        )

    def normed(self, x: Array) -> Array:
        """Hidden states [T, D] after the last layer -> the same behind the output norm."""
        return self.ops.rmsnorm(x, self.norm, self.config.norm_eps)

    def logits(self, x: Array) -> Array:
        """Hidden states [T, D] after the last layer -> [T, V]."""
        return self.ops.head(self.normed(x), self.head)


class _Loader:
    """Takes tensors out of a file, each held against the shape that the configuration calls for."""

    def __init__(self, config: ModelConfig, file: GGUFFile, ops: Ops, matrix: Callable[..., Any]) -> None:
        """``matrix`` makes a handle of the matrices of a layer."""
        self.config, self.file, self.ops, self.matrix = config, file, ops, matrix

    def checked(self, name: str, *shape: int) -> TensorInfo:
        tensor = self.file.tensor(name)
        if tensor.shape != shape:
            raise ModelFileError(
                f"{self.file.path}: tensor '{name}' has shape {tensor.shape}, the metadata calls for {shape}; "
                "the file is inconsistent; convert the model anew"
            )
        check_readable(tensor)  # here, before the time that loading takes
        return tensor

    def vector(self, name: str, size: int) -> Array:
        return self.ops.vector(self.checked(name, size))

    def biases(self, prefix: str, sizes: dict[str, int]) -> Array | None:
        """The biases of several stacked matrices, stacked; None if the file has none of them."""
        names = [f"{prefix}.{part}.bias" for part in sizes]
        present = [name for name in names if name in self.file.tensors]
        if not present:
            return None
        parts: list[TensorInfo | int] = []
        for part, size in sizes.items():
            name = f"{prefix}.{part}.bias"
            if name not in self.file.tensors:
                parts.append(size)
                continue
            bias = self.checked(name, size)
            parts.append(self._reordered(bias) if part in ("attn_q", "attn_k") else bias)
        return self.ops.vector(*parts)

    def layer(self, number: int) -> Layer:
        c, blk = self.config, f"blk.{number}"
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        return Layer(
            attn_norm=self.vector(f"{blk}.attn_norm.weight", c.d_model),
            qkv=self.matrix(
                self._reordered(self.checked(f"{blk}.attn_q.weight", q, c.d_model)),
                self._reordered(self.checked(f"{blk}.attn_k.weight", kv, c.d_model)),
                self.checked(f"{blk}.attn_v.weight", kv, c.d_model),
                half=c.head_dim // 2,  # apart lie the two that RoPE turns into each other
            ),
            qkv_bias=self.biases(blk, {"attn_q": q, "attn_k": kv, "attn_v": kv}),
            out=self.matrix(self.checked(f"{blk}.attn_output.weight", c.d_model, q)),
            out_bias=self.biases(blk, {"attn_output": c.d_model}),
            ffn_norm=self.vector(f"{blk}.ffn_norm.weight", c.d_model),
            gate_up=self.matrix(
                self.checked(f"{blk}.ffn_gate.weight", c.d_ff, c.d_model),
                self.checked(f"{blk}.ffn_up.weight", c.d_ff, c.d_model),
                half=c.d_ff,
            ),
            gate_up_bias=self.biases(blk, {"ffn_gate": c.d_ff, "ffn_up": c.d_ff}),
            down=self.matrix(self.checked(f"{blk}.ffn_down.weight", c.d_model, c.d_ff)),
            down_bias=self.biases(blk, {"ffn_down": c.d_model}),
        )

    def _reordered(self, tensor: TensorInfo) -> TensorInfo:
        """Rows of a query or key tensor moved from RoPE's interleaved layout to the half-split one.

        GGUF's llama layout rotates rows (2i, 2i+1) of a head together. Both projections are reordered alike, so every
        product q.k is the same sum in another order; the backends then need one RoPE kernel. Rows are the unit of
        packing, so packed tensors are reordered without unpacking.
        """
        rope = self.config.rope
        if not rope.interleaved:
            return tensor
        width = self.config.head_dim
        within = np.concatenate([np.arange(0, rope.dims, 2), np.arange(1, rope.dims, 2), np.arange(rope.dims, width)])
        rows = (np.arange(0, tensor.shape[0], width)[:, None] + within).reshape(-1)
        return TensorInfo(tensor.name, tensor.shape, tensor.type, tensor.data[rows])

    def rope_divisors(self) -> np.ndarray | None:
        if self.config.rope.scaling != "llama3":
            return None
        return dequantize(self.checked("rope_freqs.weight", self.config.rope.dims // 2)).reshape(-1)
