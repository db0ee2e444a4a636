"""Tensors out of a model file, each held against the shape that the configuration calls for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from slimrt.config import ModelConfig
from slimrt.errors import ModelFileError
from slimrt.models.families import ARCHITECTURES
from slimrt.ops.layer import Experts, HeadNorms, Merge
from slimrt.ops.protocol import Array, Ops
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.quants import check_readable, dequantize

__all__ = ["Loader", "half_split_rows"]

_LAYER = re.compile(r"^blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)$")
# Tensors that a layer's results do not depend on, or that are read where they occur.
_ANY = {"rope_freqs", "attn_rot_embd", "rope_factors_long", "rope_factors_short"}


class Loader:
    """Makes the parts of a layer (the fields of ``llama.Layer``) on ``ops``."""

    def __init__(self, config: ModelConfig, file: GGUFFile, ops: Ops, matrix: Callable[..., Any]) -> None:
        """``matrix`` makes a handle of the matrices of a layer."""
        self.config, self.file, self.ops, self.matrix = config, file, ops, matrix
        self.family = ARCHITECTURES[config.arch]

    def check_names(self) -> None:
        """Raises ModelFileError for a layer's tensor that nothing here reads: left out, it would change the results."""
        c = self.config
        known = {"attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down", *_ANY}
        known |= {"attn_norm"} if c.norms != "after" else set()
        known |= {self.family.ffn_norm} if c.norms != "after" and not c.parallel else set()
        known |= {"attn_sinks"} if c.sinks else set()
        known |= {"post_attention_norm", "post_ffw_norm"} if c.norms != "before" else set()
        known |= {"attn_q_norm", "attn_k_norm"} if c.qk_norm != "none" else set()
        if c.experts:
            known |= {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
        for name in self.file.tensors:
            match = _LAYER.match(name)
            if match and (match[2] not in known or (match[3] == "bias" and match[2].endswith("norm"))):
                raise ModelFileError(
                    f"{self.file.path}: tensor '{name}': slimrt runs {c.arch} without it; leaving it out would change "
                    "the results; use another model"
                )

    def checked(self, name: str, *shape: int) -> TensorInfo:
        tensor = self.file.tensor(name)
        if tensor.shape != shape:
            raise ModelFileError(
                f"{self.file.path}: tensor '{name}' has shape {tensor.shape}, the metadata calls for {shape}; "
                "the file is inconsistent; convert the model again"
            )
        check_readable(tensor)  # here, before the time that loading takes
        return tensor

    def vector(self, name: str, size: int) -> Array:
        return self.ops.vector(self.checked(name, size))

    def layer(self, number: int) -> dict[str, Any]:
        """The fields of ``llama.Layer``."""
        c, blk = self.config, f"blk.{number}"
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        sizes = {"attn_q": q, "attn_k": kv, "attn_v": kv}
        before, behind = c.norms != "after", c.norms != "before"
        fields: dict[str, Any] = {
            "attn_norm": self.vector(f"{blk}.attn_norm.weight", c.d_model) if before else None,
            "qkv": self.matrix(
                *self._stacked(blk, "attn_qkv", sizes, c.d_model),
                half=c.head_dim // 2,  # apart lie the two that RoPE turns into each other
            ),
            "qkv_bias": self._biases(blk, "attn_qkv", sizes),
            "out": self.matrix(self.checked(f"{blk}.attn_output.weight", c.d_model, q)),
            "out_bias": self._biases(blk, "", {"attn_output": c.d_model}),
            "head_norms": self._head_norms(blk, q, kv),
            "attn_merge": self._merge(f"{blk}.post_attention_norm.weight", behind),
            "ffn_merge": self._merge(f"{blk}.post_ffw_norm.weight", behind),
            "turns": c.turns[number] if c.turns else 0,
        }
        if c.parallel:
            fields["ffn_norm"] = fields["attn_norm"]
        else:
            fields["ffn_norm"] = self.vector(f"{blk}.{self.family.ffn_norm}.weight", c.d_model) if before else None
        if c.experts:
            nothing = dict.fromkeys(("gate_up", "gate_up_bias", "down", "down_bias"))
            return fields | nothing | {"experts": self._experts(blk)}
        gate_up = {"ffn_gate": c.d_ff, "ffn_up": c.d_ff}
        return fields | {
            "gate_up": self.matrix(*self._stacked(blk, "ffn_up", gate_up, c.d_model), half=c.d_ff),
            "gate_up_bias": self._biases(blk, "ffn_up", gate_up),
            "down": self.matrix(self.checked(f"{blk}.ffn_down.weight", c.d_model, c.d_ff)),
            "down_bias": self._biases(blk, "", {"ffn_down": c.d_model}),
        }

    def _joint(self, blk: str, joint: str, sizes: dict[str, int], kind: str) -> str | None:
        """The name of the one tensor that holds all parts, if the file has them so."""
        name = f"{blk}.{joint}.{kind}"
        apart = f"{blk}.{next(iter(sizes))}.weight" in self.file.tensors
        return name if joint and name in self.file.tensors and not apart else None

    def _stacked(self, blk: str, joint: str, sizes: dict[str, int], columns: int) -> list[TensorInfo]:
        """The matrices ``sizes`` (rows by name), each a tensor of its own or rows of ``joint``."""
        whole = self._joint(blk, joint, sizes, "weight")
        if whole is None:
            parts = [self.checked(f"{blk}.{part}.weight", rows, columns) for part, rows in sizes.items()]
        else:
            tensor, parts, at = self.checked(whole, sum(sizes.values()), columns), [], 0
            for rows in sizes.values():
                parts.append(TensorInfo(whole, (rows, columns), tensor.type, tensor.data[at : at + rows]))
                at += rows
        return [self._ordered(name, part) for name, part in zip(sizes, parts, strict=True)]

    def _biases(self, blk: str, joint: str, sizes: dict[str, int]) -> Array | None:
        """The biases of several stacked matrices, stacked; None if the file has none of them."""
        whole = self._joint(blk, joint, sizes, "bias")
        if whole is not None:
            tensor, at, parts = self.checked(whole, sum(sizes.values())), 0, list[TensorInfo | int]()
            for name, size in sizes.items():
                parts.append(self._ordered(name, TensorInfo(whole, (size,), tensor.type, tensor.data[at : at + size])))
                at += size
            return self.ops.vector(*parts)
        names = {part: f"{blk}.{part}.bias" for part in sizes}
        if not any(name in self.file.tensors for name in names.values()):
            return None
        return self.ops.vector(
            *(
                self._ordered(part, self.checked(names[part], size)) if names[part] in self.file.tensors else size
                for part, size in sizes.items()
            )
        )

    def largest_key_bias(self, number: int) -> float:
        """The largest magnitude in the bias of the keys of layer ``number``, 0 where there is none."""
        c, blk = self.config, f"blk.{number}"
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        whole = self._joint(blk, "attn_qkv", {"attn_q": q, "attn_k": kv, "attn_v": kv}, "bias")
        if whole is not None:
            bias = dequantize(self.checked(whole, q + 2 * kv)).reshape(-1)[q : q + kv]
        elif f"{blk}.attn_k.bias" in self.file.tensors:
            bias = dequantize(self.checked(f"{blk}.attn_k.bias", kv))
        else:
            return 0.0
        return float(np.abs(bias).max())

    def sinks(self, number: int) -> Array:
        """Of layer ``number``, a score for each query head."""
        return self.vector(f"blk.{number}.attn_sinks.weight", self.config.n_heads)

    def _ordered(self, name: str, tensor: TensorInfo) -> TensorInfo:
        """Rows of a query or key tensor moved from RoPE's interleaved layout to the half-split one.

        In the interleaved layout rows (2i, 2i+1) of a head are turned together. Both projections are reordered alike,
        so every product q.k is the same sum in another order; the backends then need one RoPE kernel. Rows are the unit
        of packing, so packed tensors are reordered without unpacking.
        """
        rope = self.config.rope
        if not rope.interleaved or name not in ("attn_q", "attn_k"):
            return tensor
        rows = half_split_rows(self.config, tensor.shape[0])
        return TensorInfo(tensor.name, tensor.shape, tensor.type, tensor.data[rows])

    def _head_norms(self, blk: str, q: int, kv: int) -> HeadNorms | None:
        c = self.config
        if c.qk_norm == "none":
            plain = c.query_scale == 1 and c.query_growth is None
            return None if plain else HeadNorms(None, None, c.norm_eps, c.query_scale)
        q, kv = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q, kv)
        gains = [self.vector(f"{blk}.attn_{part}_norm.weight", size) for part, size in (("q", q), ("k", kv))]
        return HeadNorms(gains[0], gains[1], c.norm_eps, c.query_scale)

    def _merge(self, name: str, behind: bool) -> Merge | None:
        c = self.config
        if not behind and c.residual_scale == 1:
            return None
        return Merge(self.vector(name, c.d_model) if behind else None, c.norm_eps, c.residual_scale)

    def _experts(self, blk: str) -> Experts:
        """Each expert's matrices are handles of their own on the stacked tensors."""
        c, e = self.config, self.config.experts
        assert e is not None
        gate, up = (
            self.checked(f"{blk}.ffn_{part}_exps.weight", e.count, e.d_ff, c.d_model) for part in ("gate", "up")
        )
        down = self.checked(f"{blk}.ffn_down_exps.weight", e.count, c.d_model, e.d_ff)

        def one(tensor: TensorInfo, expert: int) -> TensorInfo:
            return TensorInfo(tensor.name, tensor.shape[1:], tensor.type, tensor.data[expert])

        numbers = range(e.count)
        router_bias = gate_up_bias = down_bias = None
        if self.family.expert_biases:
            router_bias = self.vector(f"{blk}.ffn_gate_inp.bias", e.count)
            gate_bias, up_bias = (
                self.checked(f"{blk}.ffn_{part}_exps.bias", e.count, e.d_ff) for part in ("gate", "up")
            )
            gate_up_bias = tuple(self.ops.vector(one(gate_bias, n), one(up_bias, n)) for n in numbers)
            of_down = self.checked(f"{blk}.ffn_down_exps.bias", e.count, c.d_model)
            down_bias = tuple(self.ops.vector(one(of_down, n)) for n in numbers)
        return Experts(
            router=self.matrix(self.checked(f"{blk}.ffn_gate_inp.weight", e.count, c.d_model)),
            gate_up=tuple(self.matrix(one(gate, n), one(up, n), half=e.d_ff) for n in numbers),
            down=tuple(self.matrix(one(down, n)) for n in numbers),
            used=e.used,
            normalised=e.normalised,
            router_bias=router_bias,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )

    def rope_divisors(self) -> np.ndarray | None:
        """What the frequencies of the model's RoPE are divided by [dims/2], or None."""
        rope = self.config.rope
        names = {"llama3": "rope_freqs", "longrope": f"rope_factors_{'long' if rope.long else 'short'}"}
        if rope.scaling not in names:
            return None
        return dequantize(self.checked(f"{names[rope.scaling]}.weight", rope.dims // 2)).reshape(-1)


def half_split_rows(config: ModelConfig, count: int) -> np.ndarray:
    """Of ``count`` rows of heads in RoPE's interleaved layout those that stand in each place of the half-split one."""
    dims, width = config.rope.dims, config.head_dim
    within = np.concatenate([np.arange(0, dims, 2), np.arange(1, dims, 2), np.arange(dims, width)])
    rows: np.ndarray = (np.arange(0, count, width)[:, None] + within).reshape(-1)
    return rows
