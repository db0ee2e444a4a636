"""Frozen settings. Config, weights and state never mix; unknown keys and values out of range are refused here.

One alphabet of shapes, used in every docstring: T tokens, D model width, H query heads, Hkv KV heads, Dh head width,
F feed-forward width, V vocabulary, L layers, B blocks, U units, N keys in a cache.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from slimrt.errors import SettingError

__all__ = [
    "CacheConfig",
    "ExpertConfig",
    "ModelConfig",
    "Overflow",
    "RopeConfig",
    "SamplingConfig",
    "check_overflow",
    "context_advice",
    "is_whole",
    "parse_size",
]

_MOST_BREAKERS = 64
_MOST_PENALTY = 1e6
RopeScaling = Literal["none", "linear", "yarn", "llama3", "longrope"]


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number, NumPy's too; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (RoFormer, arXiv 2104.09864) and its stretching to longer contexts.

    ``interleaved``: pairs are (0, 1), (2, 3), ... (GGUF's llama layout), else (0, Dh/2), (1, Dh/2+1), ... (qwen2's).
    ``factor`` divides positions (linear) or the slow frequencies (YaRN, arXiv 2309.00071; ``original_ctx`` is the
    context before stretching). ``llama3`` takes its per-frequency divisors from the file's ``rope_freqs`` tensor,
    ``longrope`` (LongRoPE, arXiv 2402.13753) from ``rope_factors_long`` where the context passes the original one
    (``long``), else from ``rope_factors_short``. ``whole_ramp``: YaRN's ramp begins and ends at whole dimensions.
    """

    base: float = 10000.0
    dims: int = 64
    interleaved: bool = True
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_ctx: int = 0
    attn_factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    long: bool = False
    whole_ramp: bool = True


@dataclass(frozen=True)
class ExpertConfig:
    """A feed-forward of ``count`` experts of width ``d_ff`` each, of which a token passes the ``used`` likeliest.

    The router's softmax weighs them; ``normalised``: so that the chosen ones' weights sum to 1.
    """

    count: int
    used: int
    d_ff: int
    normalised: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one model, and what its layers do (``slimrt.models.architecture`` has the words).

    ``n_params`` counts the weights in the file. ``d_ff`` is that of one expert where there are ``experts``. Layer i
    sees the last ``windows[i]`` positions, its own among them (0, or no entry: all before it); it is turned by ``rope``
    (``turns[i]`` 0, or no entry), by ``local_rope`` (1) or not at all (-1). A scale of 1 and a cap of 0 do nothing;
    ``query_scale`` is what queries are multiplied with besides 1 / sqrt(Dh); those at position p, with ``query_growth``
    (b, n), also with 1 + b ln(1 + p // n).
    """

    arch: str
    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    ctx_train: int
    norm_eps: float
    rope: RopeConfig
    n_params: int = 0
    norms: Literal["before", "after", "both"] = "before"
    centred: bool = False
    parallel: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    activation: Literal["silu", "gelu", "clamped"] = "silu"
    sinks: bool = False
    query_scale: float = 1.0
    query_growth: tuple[float, int] | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    windows: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    experts: ExpertConfig | None = None

    def window(self, layer: int) -> int:
        """How many of the last positions ``layer`` sees, 0: all."""
        return self.windows[layer] if self.windows else 0

    def sees_all(self) -> list[int]:
        """The layers without a window of their own: only these can tell which blocks of a prompt are wanted."""
        return [layer for layer in range(self.n_layers) if not self.window(layer)]

    @property
    def d_ff_computed(self) -> int:
        """The width of all that a token passes in a feed-forward."""
        return self.d_ff * (self.experts.used if self.experts else 1)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers (float32)."""
        return self.n_layers * 2 * self.n_kv_heads * self.head_dim * 4


@dataclass(frozen=True)
class CacheConfig:
    """Where keys and values lie. ``ctx`` is the most tokens a conversation may hold.

    ``budget``: rows of each layer that stay resident (None: all), in whole blocks of ``block`` rows; the rest lies in
    host memory. A prompt is read exactly; decode reads the budget: the first ``sink_blocks``, the last ``local_blocks``
    and the one being filled, and those whose units (``unit`` rows, of which the mean key stays resident) the query
    wants most by ``score``. In a context of more than ``shortlist`` times the budget only the units of the best groups
    of ``group`` blocks are compared, found by the groups' mean keys: a choice costs about the same however long the
    context is. What a block was wanted for by the queries before counts as well, times ``decay`` for each token since
    then (0: not at all). A layer chooses for every ``choose_every``-th token and when a block is full; layers take
    turns, and blocks move only if less than ``overlap`` of a choice is resident. A prompt that continues an earlier one
    finds old rows brought up to ``lookahead`` layers before the one that computes.
    """

    ctx: int
    budget: int | None = None
    block: int = 16
    unit: int = 8
    sink_blocks: int = 1
    local_blocks: int = 4
    score: str = "token_max"
    group: int = 8
    shortlist: int = 4
    decay: float = 0.85
    choose_every: int = 2
    overlap: float = 0.9
    lookahead: int = 1

    def __post_init__(self) -> None:
        for name, low in (("block", 1), ("unit", 1), ("local_blocks", 0), ("sink_blocks", 0)):
            _check(getattr(self, name), name, low, math.inf)
        for name in ("group", "shortlist", "choose_every"):
            _check(getattr(self, name), name, 1, math.inf)
        _check(self.lookahead, "lookahead", 1, math.inf)
        _check(self.overlap, "overlap", 0, 1)
        _check(self.decay, "decay", 0, 1)
        if self.block % self.unit:
            raise SettingError(f"KV cache: block {self.block} must be a multiple of unit {self.unit}")
        if self.budget is None:
            return
        always = self.sink_blocks + self.local_blocks + 1
        if not isinstance(self.budget, int) or self.budget < always * self.block:
            raise SettingError(
                f"KV budget {self.budget!r}: must be a whole number of at least {always * self.block} rows a layer "
                f"({self.sink_blocks} sink, {self.local_blocks} local and 1 open block of {self.block}); raise it, or "
                "leave it out to keep all rows"
            )

    @property
    def offloads(self) -> bool:
        """Whether rows of a full context lie behind a budget: there is one, and the context exceeds it."""
        return self.budget is not None and self.ctx > self.budget

    @property
    def slots(self) -> int:
        """How many blocks of a layer stay resident within the budget; no more than the context can fill."""
        assert self.budget is not None
        return min(self.budget // self.block, -(-self.ctx // self.block))


Overflow = Literal["error", "shift"]  # what happens when the context is full


def check_overflow(overflow: object) -> None:
    """Raise SettingError unless ``overflow`` is one of the two ways."""
    if overflow not in get_args(Overflow):
        raise SettingError(f"overflow {overflow!r}: must be 'error' or 'shift' (drop the oldest text)")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The defaults draw the likeliest token (greedy).

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``typical_p`` 1, ``top_n_sigma`` 0 and
    ``xtc_probability`` 0 switch a filter off. ``top_n_sigma`` keeps logits within that many standard deviations of the
    largest (arXiv 2411.07641). XTC, with ``xtc_probability``, leaves out all tokens of at least ``xtc_threshold`` but
    the least likely of them. ``dynatemp_range`` moves the temperature by up to that much down or up, as the entropy of
    the candidates, of the most that it could be and to the power of ``dynatemp_exponent``, is small or large.
    ``mirostat`` 1 or 2 (arXiv 2007.14966) takes the place of all filters: the text's surprise is held at
    ``mirostat_tau`` bits, corrected at the rate ``mirostat_eta``. Penalties and DRY that are asked for apply before it,
    as llama-cpp-python's penalties do; llama.cpp's own programs leave them out without a word.
    DRY, with a ``dry_multiplier`` above 0, subtracts multiplier * ``dry_base`` ** (n - ``dry_allowed_length``) from the
    logit of a token that would make a repetition of n tokens, among the last ``dry_penalty_last_n``, longer; no
    repetition goes across one of the ``dry_sequence_breakers``.
    ``repeat_penalty`` divides positive and multiplies negative logits of tokens among the last ``penalty_last_n``
    (-1: the whole context); ``presence_penalty`` and ``frequency_penalty`` are subtracted, as in OpenAI's API.
    ``logit_bias`` is added to the logits of the named tokens. ``seed`` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.temperature, "temperature", 0, math.inf)
        _check_whole(self.top_k, "top_k", 0)
        _check(self.top_p, "top_p", 0, 1)
        _check(self.min_p, "min_p", 0, 1)
        _check(self.typical_p, "typical_p", 0, 1)
        _check(self.top_n_sigma, "top_n_sigma", 0, math.inf)
        _check(self.xtc_probability, "xtc_probability", 0, 1)
        _check(self.xtc_threshold, "xtc_threshold", 0, 1)
        for name, most in (("dynatemp_range", 100), ("dynatemp_exponent", 100), ("mirostat_tau", 100)):
            _check(getattr(self, name), name, 0, most)
        if not is_whole(self.mirostat) or self.mirostat not in (0, 1, 2):
            raise SettingError(f"mirostat {self.mirostat!r}: must be 1 or 2, the version, or 0 for none")
        _check(self.mirostat_eta, "mirostat_eta", 0, 1)
        _check(self.dry_multiplier, "dry_multiplier", 0, 1000)
        _check(self.dry_base, "dry_base", 1, 1000)
        _check_whole(self.dry_allowed_length, "dry_allowed_length", 0)
        _check_whole(self.dry_penalty_last_n, "dry_penalty_last_n", -1)
        breakers = self.dry_sequence_breakers
        listed = isinstance(breakers, Sequence) and not isinstance(breakers, str)
        if not listed or not all(isinstance(text, str) and text for text in breakers):
            raise SettingError(f"dry_sequence_breakers {breakers!r}: must be a list of texts, none of them empty")
        if len(breakers) > _MOST_BREAKERS:
            raise SettingError(f"dry_sequence_breakers: {len(breakers)} texts; at most {_MOST_BREAKERS} are searched")
        object.__setattr__(self, "dry_sequence_breakers", tuple(breakers))
        # Within these bounds logits stay finite in float32; past a thousand a penalty bans in any case.
        _check(self.repeat_penalty, "repeat_penalty", 0, _MOST_PENALTY)
        if self.repeat_penalty < 1 / _MOST_PENALTY:
            raise SettingError(
                f"repeat_penalty {self.repeat_penalty!r}: must be at least {1 / _MOST_PENALTY:g}; 1 switches it off"
            )
        _check(self.presence_penalty, "presence_penalty", -_MOST_PENALTY, _MOST_PENALTY)
        _check(self.frequency_penalty, "frequency_penalty", -_MOST_PENALTY, _MOST_PENALTY)
        _check_whole(self.penalty_last_n, "penalty_last_n", -1)
        if not isinstance(self.logit_bias, Mapping):
            raise SettingError(f"logit_bias {self.logit_bias!r}: must be a dict of token id -> number")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the filters."""
        return self.temperature == 0 and self.dynatemp_range == 0


def _check(value: Any, name: str, low: float, high: float) -> None:
    # No fractions and no whole numbers past a float's range: NumPy computes with neither.
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and isinstance(value, numbers.Rational):
        number = isinstance(value, numbers.Integral) and abs(int(value)) <= 10**308
    if not number or math.isnan(value) or not low <= value <= high:
        raise SettingError(f"{name} {value!r}: must be a number {_range(low, high)}")


def _check_whole(value: int, name: str, low: int) -> None:
    if not is_whole(value) or value < low:
        raise SettingError(f"{name} {value!r}: must be a whole number, at least {low}")


def _range(low: float, high: float) -> str:
    return f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}" if math.isfinite(low) else ""


def context_advice(ctx: int, trained: int) -> str:
    """The advice to load a model with room for ``ctx`` tokens; it says where that is more than the ``trained`` ones."""
    beyond = f", beyond the {trained:,} that the model was trained on" if ctx > trained else ""
    return f"load the model with ctx={ctx} or more (--ctx){beyond}"


def parse_size(text: str | int) -> int:
    """``"64k"`` -> 65536: a count with an optional suffix k (1024) or m (1024**2), as --ctx takes it."""
    if isinstance(text, int):
        return text
    number, suffix = text.strip().lower(), 1
    if number[-1:] in ("k", "m"):
        suffix = 1024 if number[-1] == "k" else 1024**2
        number = number[:-1]
    try:
        value = float(number) * suffix
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value == int(value) and value >= 1):
        raise SettingError(
            f"size {text!r}: must be a whole number above 0, or one with k (1024) or m, such as 8192 or 64k"
        )
    return int(value)
