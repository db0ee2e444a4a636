"""The architecture table: which GGUF architectures run, and what differs between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from slimrt.config import ModelConfig, RopeConfig, RopeScaling
from slimrt.errors import ModelFileError, SettingError
from slimrt.models.llama import Llama
from slimrt.models.unsupported import check_architecture_name
from slimrt.ops.protocol import Ops
from slimrt.weights.gguf import GGUFFile

__all__ = ["ARCHITECTURES", "Llama", "build", "read_config", "stretch_rope"]

# Name in general.architecture -> whether RoPE pairs lie side by side (GGUF's llama layout) or half a head apart.
ARCHITECTURES: dict[str, bool] = {"llama": True, "qwen2": False}

WIDEST_HEAD = 1024  # models have 64 to 256, few 512


def build(
    config: ModelConfig,
    file: GGUFFile,
    ops: Ops,
    progress: Callable[[int, int], None] | None = None,
    *,
    stream: bool = False,
) -> Llama:
    """The model's weights on ``ops``; ``stream``: those of the layers in host memory, for a device that is too small.

    Raises ModelFileError for missing or misshapen tensors.
    """
    return Llama(config, file, ops, progress, stream=stream)


def read_config(file: GGUFFile) -> ModelConfig:
    """The sizes that the metadata states; raises ModelFileError where they are absent, absurd or unsupported."""
    if (problem := check_architecture_name(file, ARCHITECTURES)) is not None:
        raise ModelFileError(problem)
    arch = file.get("general.architecture", str)

    def size(key: str, default: int | None = None) -> int:
        value = file.get(f"{arch}.{key}", int, default)
        if not 1 <= value <= 1 << 31:
            raise ModelFileError(f"{file.path}: {arch}.{key} is {value}; it must lie in 1..2^31; the file is corrupt")
        return value

    if file.get(f"{arch}.expert_count", int, 0):
        raise ModelFileError(f"{file.path}: a mixture-of-experts model; slimrt runs dense ones; use a dense model")
    heads, d_model = size("attention.head_count"), size("embedding_length")
    kv_heads = size("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{file.path}: {heads} query heads do not divide into {kv_heads} KV heads; the file is corrupt"
        )
    if f"{arch}.attention.key_length" not in file.metadata and d_model % heads:
        raise ModelFileError(
            f"{file.path}: width {d_model} does not divide into {heads} heads and {arch}.attention.key_length is "
            "missing; the file is corrupt"
        )
    head_dim = size("attention.key_length", max(1, d_model // heads))
    if head_dim > WIDEST_HEAD:  # kernels are compiled for the width, their code grows with it
        raise ModelFileError(
            f"{file.path}: heads are {head_dim} wide; slimrt runs models with heads of at most {WIDEST_HEAD}"
        )
    if (value_dim := size("attention.value_length", head_dim)) != head_dim:
        raise ModelFileError(
            f"{file.path}: keys are {head_dim} wide and values {value_dim}; slimrt runs models where they are equal"
        )
    eps = file.get(f"{arch}.attention.layer_norm_rms_epsilon", float, 1e-5)
    if not 0 < eps < 1:
        raise ModelFileError(
            f"{file.path}: layer_norm_rms_epsilon is {eps}; it must lie in (0, 1); the file is corrupt"
        )
    vocab = file.tensor("token_embd.weight").shape[0]
    ctx_train = size("context_length")
    return ModelConfig(
        arch=arch,
        name=file.get("general.name", str, file.path.stem),
        n_layers=size("block_count"),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=size("feed_forward_length"),
        vocab_size=vocab,
        ctx_train=ctx_train,
        norm_eps=eps,
        rope=_read_rope(file, arch, head_dim, ctx_train),
        n_params=sum(math.prod(t.shape) for t in file.tensors.values()),
    )


def _read_rope(file: GGUFFile, arch: str, head_dim: int, ctx_train: int) -> RopeConfig:
    dims = file.get(f"{arch}.rope.dimension_count", int, head_dim)
    if not 2 <= dims <= head_dim or dims % 2:
        raise ModelFileError(
            f"{file.path}: {arch}.rope.dimension_count is {dims}; it must be even, at least 2 and at most the head "
            f"width {head_dim}; the file is corrupt"
        )
    base = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    factor = file.get(f"{arch}.rope.scaling.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0))
    if f"{arch}.rope.scaling.type" not in file.metadata and f"{arch}.rope.scale_linear" in file.metadata:
        kind = "linear"
    if "rope_freqs.weight" in file.tensors:
        kind = "llama3"
    if kind not in ("none", "linear", "yarn", "llama3"):
        raise ModelFileError(
            f"{file.path}: {arch}.rope.scaling.type is '{kind}'; none, linear, yarn and the rope_freqs tensor are "
            "known; "
            "override it with rope_scaling"
        )
    rope = RopeConfig(
        base=base,
        dims=dims,
        interleaved=ARCHITECTURES[arch],
        scaling=cast(RopeScaling, kind),
        factor=factor,
        original_ctx=file.get(f"{arch}.rope.scaling.original_context_length", int, ctx_train),
        attn_factor=file.get(f"{arch}.rope.scaling.attn_factor", float, 1.0),
        ext_factor=file.get(f"{arch}.rope.scaling.yarn_ext_factor", float, 1.0),
        beta_fast=file.get(f"{arch}.rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=file.get(f"{arch}.rope.scaling.yarn_beta_slow", float, 1.0),
    )
    try:
        _check_rope(rope)
    except SettingError as error:
        raise ModelFileError(f"{file.path}: {error}; the file is corrupt") from None
    return rope


def _check_rope(rope: RopeConfig) -> None:
    if not (math.isfinite(rope.base) and rope.base > 1):
        raise SettingError(f"RoPE base {rope.base:g} must be above 1")
    if not (math.isfinite(rope.factor) and 0 < rope.factor <= 1e6):
        raise SettingError(f"RoPE factor {rope.factor:g} must lie in (0, 1e6]")
    if rope.scaling == "yarn" and not (rope.original_ctx > 0 and 0 < rope.beta_slow < rope.beta_fast < math.inf):
        raise SettingError(
            f"YaRN needs an original context above 0 ({rope.original_ctx}) and 0 < beta_slow < beta_fast "
            f"({rope.beta_slow:g}, {rope.beta_fast:g})"
        )
    if not (math.isfinite(rope.attn_factor) and math.isfinite(rope.ext_factor)):
        raise SettingError(f"RoPE attn_factor {rope.attn_factor:g} and ext_factor {rope.ext_factor:g} must be finite")


def stretch_rope(
    config: ModelConfig,
    ctx: int,
    *,
    base: float | None = None,
    scaling: str | None = None,
    factor: float | None = None,
) -> ModelConfig:
    """``config`` with the caller's RoPE overrides, or stretched by YaRN where the model's own context is below ``ctx``.

    ``scaling`` None stretches only a model that has no scaling of its own and only past its trained context; "none"
    never stretches. ``factor`` None is ctx / trained context for a scaling that the caller names.
    """
    rope = config.rope
    if base is not None:
        rope = replace(rope, base=base)
    if scaling is not None:
        if scaling not in ("none", "linear", "yarn"):
            raise SettingError(f"rope scaling '{scaling}': must be none, linear or yarn")
        if scaling == "none":
            rope = replace(rope, scaling="none", factor=1.0)
        else:
            rope = replace(
                rope,
                scaling=cast(RopeScaling, scaling),
                factor=factor or max(1.0, ctx / config.ctx_train),
                original_ctx=config.ctx_train,
            )
    elif factor is not None:
        kind = rope.scaling if rope.scaling in ("linear", "yarn") else "linear"
        rope = replace(rope, scaling=kind, factor=factor)
    elif rope.scaling == "none" and ctx > config.ctx_train:
        rope = replace(rope, scaling="yarn", factor=ctx / config.ctx_train, original_ctx=config.ctx_train)
    _check_rope(rope)
    return replace(config, rope=rope)
