"""What config.json states, with the defaults of Transformers' configuration classes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from slimrt.convert.hyperparameters import Hyperparameters, RopeScaling, flag, number, whole
from slimrt.errors import ModelFileError
from slimrt.models.architecture import Architecture
from slimrt.models.families import ARCHITECTURES

__all__ = ["family_of", "read_config"]

logger = logging.getLogger(__name__)

_FAMILIES = {name: family for family in ARCHITECTURES.values() for name in family.checkpoints}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_tanh"), "clamped": ("silu", "swish")}
# Windows are on unless the configuration says so, in these; in others only with ``use_sliding_window``.
_WINDOW_DEFAULTS = {"MistralForCausalLM": 4096, "MixtralForCausalLM": None, "MinistralForCausalLM": 4096}


def family_of(config: dict[str, Any], path: Path) -> tuple[str, Architecture]:
    """The checkpoint's architecture by its own name, and as slimrt has it. Raises ModelFileError for another one."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or name is None:
        raise ModelFileError(
            f"{path}: architecture {str(name)[:60]!r}; slimrt converts and runs {', '.join(_FAMILIES)}; choose "
            "a model with one of these"
        )
    return name, family


def read_config(config: dict[str, Any], path: Path) -> Hyperparameters:
    """The sizes of the checkpoint; raises ModelFileError for what is unknown, missing or contradictory."""
    name, family = family_of(config, path)
    packed = config.get("quantization_config")
    mxfp4 = family.turned_experts and isinstance(packed, dict) and packed.get("quant_method") == "mxfp4"
    if packed and not mxfp4:
        raise ModelFileError(
            f"{path}: the weights are already quantised (quantization_config); fetch the unquantised checkpoint"
        )
    config = {**family.defaults, **config}
    for ours, theirs in family.config_keys.items():
        if theirs in config:
            config[ours] = config[theirs]
    _check_layer(config, family, path)
    d_model, n_heads = whole(config, "hidden_size", path), whole(config, "num_attention_heads", path)
    explicit = config.get("head_dim") is not None
    if not explicit and d_model % n_heads:
        raise ModelFileError(
            f"{path}: width {d_model} does not divide into {n_heads} heads and head_dim is missing; mend the file"
        )
    head_dim = whole(config, "head_dim", path, default=d_model // n_heads)
    ctx_train, n_layers = whole(config, "max_position_embeddings", path), whole(config, "num_hidden_layers", path)
    rope, local = _rope_parameters(config, path)
    part = number(
        rope, "partial_rotary_factor", path, 0.01, 1, number(config, "partial_rotary_factor", path, 0.01, 1, 1)
    )
    dims = int(head_dim * part)
    biases = _ATTENTION[:3] if family.qkv_bias else _ATTENTION if flag(config, "attention_bias", path) else ()
    window, pattern = _windows(config, name, family, n_layers, path)
    sizes = Hyperparameters(
        arch=family.name,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=whole(config, "num_key_value_heads", path, default=n_heads),
        head_dim=head_dim,
        explicit_head_dim=explicit,
        d_ff=whole(config, "intermediate_size", path),
        vocab_size=whole(config, "vocab_size", path),
        ctx_train=ctx_train,
        norm_eps=number(config, "rms_norm_eps", path, 1e-12, 0.1, family.eps),
        rope_base=number(
            rope, "rope_theta", path, 1.0001, 1e12, number(config, "rope_theta", path, 1.0001, 1e12, 10000.0)
        ),
        rope_scaling=_rope_scaling(config, rope, ctx_train, dims, path),
        tied=family.always_tied or flag(config, "tie_word_embeddings", path),
        biases=frozenset((*biases, *(_MLP if flag(config, "mlp_bias", path) else ()))),
        rope_dims=dims,
        local_base=local,
        window=window,
        pattern=pattern,
        query_scale=_query_scale(config, family, n_layers, d_model // n_heads, head_dim, path),
        copied={
            ours: float(number(rope | config, theirs, path, -1e6, 1e6))
            for theirs, ours in family.copied.items()
            if (rope | config).get(theirs) is not None
        },
        **_experts(config, family, path),
    )
    sizes.check(path)
    return sizes


def _check_layer(config: dict[str, Any], family: Architecture, path: Path) -> None:
    """Raises ModelFileError where the layer is another than the family's in GGUF."""
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in _ACTIVATIONS[family.activation]:
        raise ModelFileError(
            f"{path}: hidden_act {str(activation)[:40]!r}; slimrt converts and runs "
            f"{_ACTIVATIONS[family.activation][0]} for {family.name}; choose another model"
        )
    for key, only in family.fixed.items():
        if config.get(key, only) != only:
            raise ModelFileError(
                f"{path}: {key} is {str(config[key])[:40]}; GGUF's {family.name} means {only:g}; choose another model"
            )
    turned = config.get("no_rope_layers")
    stated = isinstance(family.turned, int) and isinstance(turned, list)
    if stated and any(bool(one) != (family.turns(layer, False) >= 0) for layer, one in enumerate(turned or ())):
        raise ModelFileError(
            f"{path}: no_rope_layers leaves out others than every {family.turned}th layer, which is what GGUF's "
            f"{family.name} means; choose another model"
        )
    for key, nothing in (
        ("clip_qkv", None),
        ("use_qk_norm", False),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
    ):
        if config.get(key, nothing) not in (nothing, None):
            raise ModelFileError(
                f"{path}: {key} is {str(config[key])[:40]}; slimrt runs {family.name} without it; choose another model"
            )


def _rope_parameters(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], float | None]:
    """RoPE's parameters (newer configurations keep the base inside, some one set for each kind of layer), and the base
    of the layers with windows where they state one."""
    rope: Any = next(
        (value for key in ("rope_parameters", "rope_scaling") if (value := config.get(key)) is not None), {}
    )
    if not isinstance(rope, dict):
        raise ModelFileError(f"{path}: rope scaling is a {type(rope).__name__}; an object is expected; mend the file")
    local: Any = config.get("rope_local_base_freq")
    if isinstance(rope.get("full_attention"), dict):
        inner = rope.get("sliding_attention")
        local = inner.get("rope_theta") if isinstance(inner, dict) else local
        rope = rope["full_attention"]
    return rope, None if local is None else number({"base": local}, "base", path, 1.0001, 1e12)


def _windows(
    config: dict[str, Any], name: str, family: Architecture, n_layers: int, path: Path
) -> tuple[int, tuple[bool, ...] | None]:
    """The window (0: none), and which layers have it where those are others than the family's."""
    types = config.get("layer_types")
    stated = config.get("sliding_window", _WINDOW_DEFAULTS.get(name))
    if stated is None or config.get("use_sliding_window") is False:
        return 0, None
    if types is None and "use_sliding_window" not in config and family.name.startswith("qwen"):
        return 0, None
    window = whole(config | {"sliding_window": stated}, "sliding_window", path)
    if types is None:
        first = config.get("max_window_layers") if config.get("use_sliding_window") else None
        if isinstance(first, int):
            types = ["full_attention"] * first + ["sliding_attention"] * max(0, n_layers - first)
        elif isinstance(every := config.get("sliding_window_pattern"), int) and every > 0:
            types = [("sliding_attention", "full_attention")[(layer + 1) % every == 0] for layer in range(n_layers)]
        else:
            return window, None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) < n_layers or any(one not in known for one in types):
        raise ModelFileError(
            f"{path}: layer_types is {str(types)[:60]}; each of the {n_layers} layers is full_attention or "
            "sliding_attention; choose another model"
        )
    inside = tuple(one == "sliding_attention" for one in types[:n_layers])
    if not any(inside):
        return 0, None
    return window, None if inside == tuple(map(family.windowed, range(n_layers))) else inside


def _query_scale(
    config: dict[str, Any], family: Architecture, n_layers: int, width: int, head_dim: int, path: Path
) -> float:
    """What queries are multiplied with, so that a reader that knows the family's scale only finds the checkpoint's."""
    if config.get("query_pre_attn_scalar") is None:
        return 1.0
    read = width if n_layers == family.wide_at else head_dim
    return math.sqrt(read / number(config, "query_pre_attn_scalar", path, 1e-3, 1e6))


def _experts(config: dict[str, Any], family: Architecture, path: Path) -> dict[str, Any]:
    """The fields of ``Hyperparameters`` about experts."""
    key = next((key for key in ("num_experts", "num_local_experts") if config.get(key)), None)
    if key is None or "experts" not in family.reads:
        if family.turned_experts:
            raise ModelFileError(f"{path}: num_local_experts is missing or 0; {family.name} has experts; mend the file")
        return {}
    count, used = whole(config, key, path), whole(config, "num_experts_per_tok", path)
    if used > count:
        raise ModelFileError(f"{path}: num_experts_per_tok is {used} of {count} experts; mend the file")
    normalised = flag(config, "norm_topk_prob", path, True)  # Mixtral's router has no such switch
    width = whole(config, "moe_intermediate_size", path, default=whole(config, "intermediate_size", path))
    return {"experts": (count, width), "experts_used": used, "experts_normalised": normalised}


def _longrope(config: dict[str, Any], rope: dict[str, Any], ctx_train: int, dims: int, path: Path) -> RopeScaling:
    """Phi-3's factors for short and for long contexts (LongRoPE)."""
    original = whole(
        rope, "original_max_position_embeddings", path,
        default=whole(config, "original_max_position_embeddings", path, default=ctx_train),
    )  # fmt: skip
    factors = {}
    for kind in ("long", "short"):
        values = rope.get(f"{kind}_factor")
        if not isinstance(values, list) or len(values) != dims // 2:
            found = len(values) if isinstance(values, list) else str(values)[:40]
            raise ModelFileError(
                f"{path}: {kind}_factor has {found} entries, RoPE turns {dims // 2} pairs; mend the file"
            )
        factors[kind] = tuple(number({"factor": value}, "factor", path, 1e-3, 1e6) for value in values)
    scale = number(rope, "factor", path, 1e-3, 1e6, ctx_train / original)
    gain = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return RopeScaling(
        "longrope",
        scale,
        original,
        attention_factor=number(rope, "attention_factor", path, 1e-3, 1e3, gain),
        long_factors=factors["long"],
        short_factors=factors["short"],
    )


def _rope_scaling(
    config: dict[str, Any], rope: dict[str, Any], ctx_train: int, dims: int, path: Path
) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return None
    if kind in ("longrope", "su"):
        return _longrope(config, rope, ctx_train, dims, path)
    if kind not in ("linear", "yarn", "llama3"):
        raise ModelFileError(
            f"{path}: rope scaling {str(kind)[:40]!r}; linear, yarn, llama3 and longrope can be converted; remove it "
            "to convert for the original context"
        )
    factor = number(rope, "factor", path, 1e-3, 1e6)
    # As Transformers does: YaRN without an original context stretches the stated one.
    original = whole(rope, "original_max_position_embeddings", path, default=ctx_train if kind != "llama3" else None)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor", path, 1e-3, 1e6), number(rope, "high_freq_factor", path, 1e-3, 1e6)
        if low >= high:
            raise ModelFileError(
                f"{path}: low_freq_factor {low:g} must be below high_freq_factor {high:g}; mend the file"
            )
        return RopeScaling("llama3", factor, original, low, high)
    if rope.get("original_max_position_embeddings") is not None and not math.isclose(factor, ctx_train / original):
        logger.warning(
            "%s: YaRN factor %g, but the context grows by %g; the file keeps the stated factor",
            path,
            factor,
            ctx_train / original,
        )

    def optional(key: str) -> float | None:
        return None if rope.get(key) is None else number(rope, key, path, 1e-6, 1e6)

    gain, gained = optional("attention_factor"), (optional("mscale"), optional("mscale_all_dim"))
    if gain is None and None not in gained:  # DeepSeek's way to say it: one gain over the other
        over, under = (1 + 0.1 * (part or 0) * math.log(max(1.0, factor)) for part in gained)
        gain = over / under
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=gain,
        log_multiplier=gained[1] if gain == 1 else None,
        beta_fast=optional("beta_fast"),
        beta_slow=optional("beta_slow"),
        whole_ramp=flag(rope, "truncate", path, True),
    )
