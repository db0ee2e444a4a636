"""The sizes of a model to convert, the tensors that it must have, and its metadata keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from slimrt.errors import ModelFileError

__all__ = ["Hyperparameters", "RopeScaling", "flag", "number", "whole"]


@dataclass(frozen=True)
class RopeScaling:
    """RoPE stretched to longer contexts. The last three belong to ``yarn``, the frequency factors to ``llama3``."""

    kind: Literal["linear", "yarn", "llama3"]
    factor: float
    original_ctx: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None


@dataclass(frozen=True)
class Hyperparameters:
    """What the metadata states. ``explicit_head_dim``: the source names the head width itself.

    ``biases``: tensor name parts (``attn_q``, ``ffn_up``, ...) whose bias the source promises.
    """

    arch: Literal["llama", "qwen2"]
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    explicit_head_dim: bool
    d_ff: int
    vocab_size: int
    ctx_train: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    biases: frozenset[str] = frozenset()

    def check(self, path: Path) -> None:
        """Raises ModelFileError where the sizes contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ModelFileError(
                f"{path}: {self.n_heads} query heads do not divide into {self.n_kv_heads} KV heads; fetch the file anew"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"{path}: head width {self.head_dim} is odd; RoPE turns pairs; fetch the file anew")
        if self.arch != "llama" and self.rope_scaling and self.rope_scaling.kind == "llama3":
            raise ModelFileError(
                f"{path}: llama3 RoPE scaling with architecture {self.arch}; GGUF has it for llama; remove rope_scaling"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF names and shapes of every tensor that may occur, in file order."""
        d, q, kv, f = self.d_model, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.d_ff
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, d),
            "output_norm.weight": (d,),
            "output.weight": (self.vocab_size, d),
        }
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            shapes[f"{block}attn_norm.weight"] = (d,)
            shapes[f"{block}ffn_norm.weight"] = (d,)
            linear = (("attn_q", q, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, q))
            for part, rows, columns in (*linear, ("ffn_gate", f, d), ("ffn_up", f, d), ("ffn_down", d, f)):
                shapes[f"{block}{part}.weight"] = (rows, columns)
                shapes[f"{block}{part}.bias"] = (rows,)
        return shapes

    def required(self, name: str) -> bool:
        """Whether the source must have the tensor of this GGUF name."""
        if name == "output.weight":
            return not self.tied
        return name.endswith(".weight") or name.split(".")[-2] in self.biases

    def rope_divisors(self) -> np.ndarray | None:
        """The ``rope_freqs`` tensor [Dh / 2]: what llama3 scaling divides each frequency by; None for other kinds.

        Wavelengths under the original context / ``high_freq_factor`` stay, those over the original context /
        ``low_freq_factor`` are divided by ``factor``, those between are interpolated (Llama 3.1, apply_scaling).
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "llama3":
            return None
        inverse = self.rope_base ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        wavelength = 2 * np.pi / inverse
        smooth = (scaling.original_ctx / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)

    def write(self, writer: GGUFWriter) -> None:
        """Add the architecture's keys, those that convert_hf_to_gguf.py writes."""
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.ctx_train)
        writer.add_embedding_length(self.d_model)
        writer.add_feed_forward_length(self.d_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        if self.explicit_head_dim:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(self.rope_base)
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_ctx)
            if scaling.attention_factor is not None:
                # Transformers states the whole factor; GGUF's multiplies YaRN's own 1 + 0.1 ln(factor).
                writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1.0 + 0.1 * math.log(scaling.factor)))
            if scaling.beta_fast is not None:
                writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            if scaling.beta_slow is not None:
                writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def number(
    data: Mapping[str, Any], key: str, path: Path, low: float, high: float, default: float | None = None
) -> float:
    """``data[key]`` held against a range; an absent or null key takes ``default``.

    Raises ModelFileError if there is neither, or the value is of another kind or out of range.
    """
    value = data.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"{path}: '{key}' is missing; the architecture requires it; fetch the file anew")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ModelFileError(
            f"{path}: '{key}' is {str(value)[:60]!r}; it must be a number from {low:g} to {high:g}; mend the file"
        )
    return value


def whole(data: Mapping[str, Any], key: str, path: Path, low: int = 1, default: int | None = None) -> int:
    """Like :func:`number`, for whole numbers from ``low`` to 2**31."""
    value = number(data, key, path, low, 1 << 31, default)
    if value != int(value):
        raise ModelFileError(f"{path}: '{key}' is {value}; it must be a whole number; mend the file")
    return int(value)


def flag(data: Mapping[str, Any], key: str, path: Path, default: bool = False) -> bool:
    """``data[key]`` as true or false; raises ModelFileError for anything else."""
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelFileError(f"{path}: '{key}' is {str(value)[:60]!r}; it must be true or false; mend the file")
    return value
