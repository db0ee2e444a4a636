"""The sizes of a model to convert, the tensors that it must have, and its metadata keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from slimrt.errors import ModelFileError
from slimrt.models.architecture import Architecture
from slimrt.models.families import ARCHITECTURES

__all__ = ["Hyperparameters", "RopeScaling", "flag", "number", "whole"]

_LLAMA3 = ("llama", "smollm3", "exaone")  # whose readers look for the tensor rope_freqs


@dataclass(frozen=True)
class RopeScaling:
    """RoPE stretched to longer contexts, see ``RopeConfig``. The frequency factors belong to ``llama3``."""

    kind: Literal["linear", "yarn", "llama3", "longrope"]
    factor: float
    original_ctx: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    log_multiplier: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    whole_ramp: bool = True
    long_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Hyperparameters:
    """What the metadata states. ``explicit_head_dim``: the source names the head width itself.

    ``biases``: tensor name parts (``attn_q``, ``ffn_up``, ...) whose bias the source promises. ``rope_dims`` 0: RoPE
    turns whole heads; ``local_base``: another base of the layers with a window, None: the family's. ``window`` 0: none;
    ``pattern``: which layers have it, None: those of the family. ``query_scale``: what the rows or norms of queries are
    multiplied with. ``copied``: metadata taken over, by key. ``experts``: how many, and the width of each.
    """

    arch: str
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
    rope_dims: int = 0
    local_base: float | None = None
    window: int = 0
    pattern: tuple[bool, ...] | None = None
    query_scale: float = 1.0
    copied: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[int, int] | None = None
    experts_used: int = 0
    experts_normalised: bool = True

    @property
    def family(self) -> Architecture:
        """What its layers are made of."""
        return ARCHITECTURES[self.arch]

    @property
    def tensors_a_layer(self) -> int:
        """How many tensors a checkpoint has for each layer at least."""
        # Some hold Q, K and V, or the gate and up of experts, in one.
        return len(self._layer()) - 2 * self.family.grouped_qkv - (self.experts is not None)

    def _layer(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return self.family.layer_shapes(self.d_model, q, kv, self.d_ff, self.head_dim, self.experts)

    def check(self, path: Path) -> None:
        """Raises ModelFileError where the sizes contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ModelFileError(
                f"{path}: {self.n_heads} query heads do not divide into {self.n_kv_heads} KV heads; fetch it again"
            )
        if (self.rope_dims or self.head_dim) % 2:
            raise ModelFileError(
                f"{path}: head width {self.rope_dims or self.head_dim} is odd; RoPE turns pairs; fetch the file again"
            )
        kind = self.rope_scaling.kind if self.rope_scaling else ""
        if kind == "llama3" and self.arch not in _LLAMA3:
            raise ModelFileError(
                f"{path}: llama3 RoPE scaling with architecture {self.arch}; GGUF has it for llama; remove rope_scaling"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF names and shapes of every tensor that may occur, in file order."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, self.d_model),
            "output_norm.weight": (self.d_model,),
            "output.weight": (self.vocab_size, self.d_model),
        }
        layer = self._layer()
        for number in range(self.n_layers):
            for part, shape in layer.items():
                shapes[f"blk.{number}.{part}.weight"] = shape
                if part.startswith("ffn_gate_inp") or len(shape) == 3:
                    if self.family.expert_biases:
                        shapes[f"blk.{number}.{part}.bias"] = shape[:-1]
                elif len(shape) == 2:
                    shapes[f"blk.{number}.{part}.bias"] = shape[:1]
        return shapes

    def required(self, name: str) -> bool:
        """Whether the source must have the tensor of this GGUF name."""
        if name == "output.weight":
            return not self.tied
        part = name.split(".")[-2]
        parts = {"attn_qkv": "attn_q", "ffn_up": "ffn_up"}.get(part, part) if self.family.fused else part
        of_experts = self.family.expert_biases and (part == "ffn_gate_inp" or part.endswith("_exps"))
        return name.endswith(".weight") or parts in self.biases or of_experts

    def rope_divisors(self) -> np.ndarray | None:
        """The ``rope_freqs`` tensor [Dh / 2]: what llama3 scaling divides each frequency by; None for other kinds.

        Wavelengths under the original context / ``high_freq_factor`` stay, those over the original context /
        ``low_freq_factor`` are divided by ``factor``, those between are interpolated (Llama 3.1, apply_scaling).
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "llama3":
            return None
        dims = self.rope_dims or self.head_dim
        inverse = self.rope_base ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
        wavelength = 2 * np.pi / inverse
        smooth = (scaling.original_ctx / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1.0 / ((1.0 - smooth) / scaling.factor + smooth)).astype(np.float32)

    def constants(self) -> dict[str, np.ndarray]:
        """Tensors that follow from the configuration: what RoPE's frequencies are divided by."""
        scaling, divisors = self.rope_scaling, self.rope_divisors()
        if divisors is not None:
            return {"rope_freqs.weight": divisors}
        if scaling is None or scaling.kind != "longrope":
            return {}
        return {
            "rope_factors_long.weight": np.array(scaling.long_factors, np.float32),
            "rope_factors_short.weight": np.array(scaling.short_factors, np.float32),
        }

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
        writer.add_float32(f"{self.arch}.{self.family.eps_key}", self.norm_eps)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.rope_dims or self.head_dim)
        writer.add_rope_freq_base(self.rope_base)
        for key, value in self.copied.items():
            writer.add_float32(f"{self.arch}.{key}", value)
        if self.window:
            writer.add_sliding_window(self.window)
            if self.pattern is not None:
                writer.add_array(f"{self.arch}.attention.sliding_window_pattern", list(self.pattern))
        if self.local_base is not None and self.local_base != self.family.local_base:
            writer.add_float32(f"{self.arch}.rope.freq_base_swa", self.local_base)
        if self.experts is not None:
            writer.add_expert_count(self.experts[0])
            writer.add_expert_used_count(self.experts_used)
            writer.add_expert_feed_forward_length(self.experts[1])
            if not self.experts_normalised:
                writer.add_expert_weights_norm(False)
        self._write_scaling(writer)

    def _write_scaling(self, writer: GGUFWriter) -> None:
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return
        if scaling.kind == "longrope":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_ctx)
            writer.add_rope_scaling_attn_factors(scaling.attention_factor or 1.0)
            return
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_ctx)
            if scaling.log_multiplier is not None and "growing queries" in self.family.reads:
                writer.add_rope_scaling_yarn_log_mul(scaling.log_multiplier)  # which says that the factor is 1
            elif scaling.attention_factor is not None:
                # Transformers states the whole factor; GGUF's multiplies YaRN's own 1 + 0.1 ln(factor).
                writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1.0 + 0.1 * math.log(scaling.factor)))
            if scaling.beta_fast is not None:
                writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
            if scaling.whole_ramp != self.family.whole_ramp:
                writer.add_bool(f"{self.arch}.rope.scaling.yarn_truncate", scaling.whole_ramp)
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
            raise ModelFileError(f"{path}: '{key}' is missing; the architecture requires it; fetch the file again")
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
