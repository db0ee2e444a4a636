"""What a model file's metadata state: sizes, RoPE, and what of its architecture differs from file to file."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np

from slimrt.config import ExpertConfig, ModelConfig, RopeConfig, RopeScaling
from slimrt.errors import ModelFileError, SettingError
from slimrt.models.architecture import Architecture, Stated
from slimrt.models.families import ARCHITECTURES
from slimrt.models.unsupported import check_architecture_name
from slimrt.weights.gguf import GGUFFile

__all__ = ["read_config", "stretch_rope"]

WIDEST_HEAD = 1024  # models have 64 to 256, few 512
_MOST_EXPERTS = 4096  # models have 8 to 512

# What only some architectures give a meaning to: metadata key -> what it is, and the value that does nothing.
_STATED: dict[str, tuple[Stated, float]] = {
    "attn_logit_softcapping": ("attention cap", 0),
    "final_logit_softcapping": ("logit cap", 0),
    "attention.scale": ("query scale", 0),
    "embedding_scale": ("embedding scale", 1),
    "residual_scale": ("residual scale", 1),
    "logit_scale": ("logit scale", 1),
    "expert_count": ("experts", 0),
    "attention.temperature_scale": ("growing queries", 0),
    "rope.scaling.yarn_log_multiplier": ("growing queries", 0),
}
# What no architecture here has: metadata key -> the value that does nothing.
_UNKNOWN = {
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.causal": 1,
    "expert_shared_count": 0,
    "expert_shared_feed_forward_length": 0,
    "expert_group_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "use_parallel_residual": 0,
}


def read_config(file: GGUFFile) -> ModelConfig:
    """The sizes that the metadata states; raises ModelFileError where they are absent, absurd or unsupported."""
    if (problem := check_architecture_name(file, ARCHITECTURES)) is not None:
        raise ModelFileError(problem)
    name = file.get("general.architecture", str)
    arch = ARCHITECTURES[name]
    _check_known(file, arch)

    def size(key: str, default: int | None = None) -> int:
        value = file.get(f"{name}.{key}", int, default)
        if not 1 <= value <= 1 << 31:
            raise ModelFileError(f"{file.path}: {name}.{key} is {value}; it must lie in 1..2^31; the file is corrupt")
        return value

    heads, d_model = size("attention.head_count"), size("embedding_length")
    kv_heads = size("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{file.path}: {heads} query heads do not divide into {kv_heads} KV heads; the file is corrupt"
        )
    if f"{name}.attention.key_length" not in file.metadata and d_model % heads:
        raise ModelFileError(
            f"{file.path}: width {d_model} does not divide into {heads} heads and {name}.attention.key_length is "
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
    layers = size("block_count")
    if f"blk.{layers - 1}.attn_output.weight" not in file.tensors:  # before anything has an entry for each layer
        raise ModelFileError(
            f"{file.path}: {name}.block_count is {layers}, and there is no tensor blk.{layers - 1}.attn_output.weight; "
            "the file is incomplete or corrupt; fetch or convert it again"
        )
    experts = _read_experts(file, arch)
    vocab = file.tensor("token_embd.weight").shape[0]
    ctx_train = size("context_length")
    rope = _read_rope(file, arch, head_dim, ctx_train)
    windows = _read_windows(file, arch, layers)
    turns = tuple(arch.turns(layer, bool(window)) for layer, window in enumerate(windows))
    local = None if arch.local_base is None else file.get(f"{name}.rope.freq_base_swa", float, arch.local_base)
    if 1 not in turns and rope.scaling == "yarn" and any(windows) and arch.norms == "after":
        turns, local = tuple(1 if window else 0 for window in windows), rope.base  # OLMo 3 stretches the others only
    return ModelConfig(
        arch=name,
        name=file.get("general.name", str, file.path.stem),
        n_layers=layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=experts.d_ff if experts else size("feed_forward_length"),
        vocab_size=vocab,
        ctx_train=ctx_train,
        norm_eps=_read_eps(file, arch),
        rope=rope,
        n_params=sum(math.prod(t.shape) for t in file.tensors.values()),
        norms=arch.norms,
        centred=arch.centred,
        parallel=arch.parallel,
        qk_norm=arch.qk_norm,
        activation=arch.activation,
        sinks=arch.sinks,
        query_scale=_query_scale(file, arch, layers, d_model // heads, head_dim),
        query_growth=_query_growth(file, arch, rope),
        attention_cap=_number(file, arch, "attn_logit_softcapping", 0.0),
        logit_cap=_number(file, arch, "final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(d_model) if arch.embedding_scale else _number(file, arch, "embedding_scale", 1.0),
        residual_scale=_number(file, arch, "residual_scale", 1.0),
        logit_scale=_number(file, arch, "logit_scale", 1.0) ** (-1 if arch.divides_logits else 1),
        windows=windows if any(windows) else (),
        turns=turns if any(turns) else (),
        local_rope=_local_rope(file, arch, local, rope) if local is not None and 1 in turns else None,
        experts=experts,
    )


def _check_known(file: GGUFFile, arch: Architecture) -> None:
    """Raises ModelFileError for metadata that would change the results and that this architecture's layer lacks."""

    def refuse(key: str, what: str) -> None:
        raise ModelFileError(
            f"{file.path}: {arch.name}.{key} is {str(file.metadata[f'{arch.name}.{key}'])[:40]}; slimrt runs "
            f"{arch.name} without {what}; use another model"
        )

    for key, (what, nothing) in _STATED.items():
        if what not in arch.reads and file.metadata.get(f"{arch.name}.{key}", nothing) != nothing:
            refuse(key, f"{'an ' if what[0] in 'ae' else 'a '}{what}" if not what.endswith("s") else what)
    for key, nothing in _UNKNOWN.items():
        if file.metadata.get(f"{arch.name}.{key}", nothing) != nothing:
            refuse(key, key.replace(".", " ").replace("_", " "))


def _read_eps(file: GGUFFile, arch: Architecture) -> float:
    eps = file.get(f"{arch.name}.{arch.eps_key}", float, 1e-5)
    if not 0 < eps < 1:
        raise ModelFileError(
            f"{file.path}: {arch.eps_key.removeprefix('attention.')} is {eps}; it must lie in (0, 1); the file is "
            "corrupt"
        )
    return eps


def _number(file: GGUFFile, arch: Architecture, key: str, nothing: float) -> float:
    """The scale or cap of ``key``, ``nothing`` where it is absent or means none here."""
    if _STATED[key][0] not in arch.reads:
        return nothing
    value = file.get(f"{arch.name}.{key}", float, nothing)
    if not (math.isfinite(value) and abs(value) < 1e6 and (value > 0 or value == nothing)):
        raise ModelFileError(f"{file.path}: {arch.name}.{key} is {value:g}; it must be above 0; the file is corrupt")
    return value


def _query_scale(file: GGUFFile, arch: Architecture, layers: int, width: int, head_dim: int) -> float:
    stated = _number(file, arch, "attention.scale", 0.0)
    if stated:
        return stated * math.sqrt(head_dim)
    return math.sqrt(head_dim / width) if layers == arch.wide_at else 1.0


def _query_growth(file: GGUFFile, arch: Architecture, rope: RopeConfig) -> tuple[float, int] | None:
    growth = _number(file, arch, "attention.temperature_scale", 0.0)
    return (growth, rope.original_ctx) if growth else None


def _read_windows(file: GGUFFile, arch: Architecture, layers: int) -> tuple[int, ...]:
    """The window of each layer, 0: none."""
    key = f"{arch.name}.attention.sliding_window"
    window = file.get(key, int, arch.window)
    if window == 0 and (arch.no_window or key not in file.metadata):
        return (0,) * layers
    if not 1 <= window <= 1 << 31:
        raise ModelFileError(
            f"{file.path}: {key} is {window}; a window has at least one token (leave the key out for none); the file "
            "is corrupt"
        )
    pattern = file.metadata.get(f"{key}_pattern")
    if pattern is None:
        inside = [arch.windowed(layer) for layer in range(layers)]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and 0 <= pattern <= layers:
        inside = [not pattern or layer % pattern < pattern - 1 for layer in range(layers)]
    elif isinstance(pattern, (list, np.ndarray)) and len(pattern) >= layers:
        inside = [bool(entry) for entry in pattern[:layers]]
    else:
        raise ModelFileError(
            f"{file.path}: {key}_pattern is {str(pattern)[:40]}; it must be a number of at most {layers} or say of "
            f"each of the {layers} layers whether it has a window; the file is corrupt"
        )
    return tuple(window if one else 0 for one in inside)


def _read_experts(file: GGUFFile, arch: Architecture) -> ExpertConfig | None:
    def whole(key: str, default: int = 0) -> int:
        return file.get(f"{arch.name}.{key}", int, default)

    stated = f"{arch.name}.expert_count" in file.metadata
    count, routed = whole("expert_count"), "blk.0.ffn_gate_inp.weight" in file.tensors
    if "experts" not in arch.reads or not (stated or routed):
        return None
    if not 1 <= count <= _MOST_EXPERTS:
        if count == 0 and not routed:
            return None
        raise ModelFileError(
            f"{file.path}: {arch.name}.expert_count is {count}; it must lie in 1..{_MOST_EXPERTS}; the file is corrupt"
        )
    used = whole("expert_used_count")
    if not 1 <= used <= count:
        raise ModelFileError(
            f"{file.path}: {arch.name}.expert_used_count is {used} of {count} experts; the file is corrupt"
        )
    gating = whole("expert_gating_func", 1)
    if gating not in (0, 1, 3):
        raise ModelFileError(
            f"{file.path}: {arch.name}.expert_gating_func is {gating}; slimrt runs experts that a softmax "
            "weighs (1, or 3 over the chosen ones); use another model"
        )
    scale = file.get(f"{arch.name}.expert_weights_scale", float, 1.0)
    if scale not in (0.0, 1.0):
        raise ModelFileError(
            f"{file.path}: {arch.name}.expert_weights_scale is {scale:g}; slimrt runs experts whose weights are not "
            "scaled; use another model"
        )
    width = whole("expert_feed_forward_length") or whole("feed_forward_length")
    if not 1 <= width <= 1 << 31:
        raise ModelFileError(f"{file.path}: experts are {width} wide; they must lie in 1..2^31; the file is corrupt")
    normalised = gating == 3 or file.get(f"{arch.name}.expert_weights_norm", bool, True)
    return ExpertConfig(count, used, width, normalised)


def _read_rope(file: GGUFFile, family: Architecture, head_dim: int, ctx_train: int) -> RopeConfig:
    arch = family.name
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
    if "rope_factors_long.weight" in file.tensors:
        kind = "longrope"
    if kind not in ("none", "linear", "yarn", "llama3", "longrope"):
        raise ModelFileError(
            f"{file.path}: {arch}.rope.scaling.type is '{kind}'; none, linear, yarn and the rope_freqs and "
            "rope_factors tensors are known; override it with rope_scaling"
        )
    attn_factor = file.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)
    if kind == "yarn" and factor > 0 and file.get(f"{arch}.rope.scaling.yarn_log_multiplier", float, 0.0):
        attn_factor = 1 / (1 + 0.1 * math.log(factor))  # of the gain and what divides it nothing is left
    rope = RopeConfig(
        base=base,
        dims=dims,
        interleaved=family.interleaved,
        scaling=cast(RopeScaling, kind),
        factor=factor,
        original_ctx=file.get(f"{arch}.rope.scaling.original_context_length", int, ctx_train),
        attn_factor=attn_factor,
        ext_factor=file.get(f"{arch}.rope.scaling.yarn_ext_factor", float, 1.0),
        beta_fast=file.get(f"{arch}.rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=file.get(f"{arch}.rope.scaling.yarn_beta_slow", float, 1.0),
        whole_ramp=file.get(f"{arch}.rope.scaling.yarn_truncate", bool, family.whole_ramp),
    )
    try:
        _check_rope(rope)
    except SettingError as error:
        raise ModelFileError(f"{file.path}: {error}; the file is corrupt") from None
    return rope


def _local_rope(file: GGUFFile, arch: Architecture, base: float, rope: RopeConfig) -> RopeConfig:
    """RoPE of the layers with windows: of a base of its own, and never stretched."""
    local = RopeConfig(base, rope.dims, arch.interleaved)
    try:
        _check_rope(local)
    except SettingError as error:
        raise ModelFileError(f"{file.path}: {error}, in layers with windows; the file is corrupt") from None
    return local


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
    if rope.scaling == "longrope":
        rope = replace(rope, long=ctx > rope.original_ctx)
    try:
        _check_rope(rope)
    except SettingError as error:
        raise SettingError(f"{error}; at a context of {ctx:,} choose other RoPE settings, or another context") from None
    return replace(config, rope=rope)
