"""Which plans are tried, and how much of the dense run's arithmetic each of them does. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from slimrt.config import ModelConfig, PrunePlan, Stage
from slimrt.errors import SettingError
from slimrt.ops.reach import keys_read
from slimrt.prune import schedule, windows

__all__ = ["MIN_TOKENS", "first_layer", "grid", "scorings", "selectors", "work"]

MIN_TOKENS = 1024  # shorter prompts are read in little time anyway, and were not measured

# Of the layers: where the first cut is tried, where scores are compared. Layers differ much in how well their attention
# tells what will be wanted (SmolLM2: 14 and 18 well, 12 and 16 badly), so each of them is.
_EARLIEST, _MIDDLE, _LATEST = 0.4, 0.47, 0.75
# The second cut comes so far into the layers that the first one leaves, a third so far behind that.
_SECOND, _THIRD = (0.3, 0.55), 0.8
_KEEPS = (
    (0.33,),
    (0.25,),
    (0.75, 0.25),
    (0.5, 0.25),
    (0.5, 0.125),
    (0.33, 0.17),
    (0.25, 0.125),
    (0.5, 0.25, 0.125),
)
_SCORES = ("token_max", "token_mass", "unit_softmax", "mean_qk")


def first_layer(config: ModelConfig) -> int:
    """The earliest layer that any candidate cuts at. Raises SettingError for a model too shallow to be cut."""
    layer = round(_EARLIEST * config.n_layers)
    if not 0 < layer < config.n_layers - 1:
        raise SettingError(f"calibrate: this model has {config.n_layers} layers, at least 4 are needed to prune it")
    return layer


def scorings(config: ModelConfig) -> list[PrunePlan]:
    """One middling choice of stages under every score, with a short query window and a wide local window too."""
    stages = _stages(config, round(_MIDDLE * config.n_layers), (0.5, 0.25), _SECOND[1])
    plain = [PrunePlan(stages, score=score, query_window=32, min_tokens=MIN_TOKENS) for score in _SCORES]
    best = plain[0]
    return [*plain, dataclasses.replace(best, local_blocks=8), dataclasses.replace(best, query_window=16)]


def selectors(config: ModelConfig, scoring: PrunePlan) -> list[PrunePlan]:
    """A single cut to one half at every layer that may be the first, scored as ``scoring`` does; earliest first."""
    last = max(first_layer(config), min(round(_LATEST * config.n_layers), config.n_layers - 2))
    layers = range(first_layer(config), last + 1)
    return [dataclasses.replace(scoring, stages=(Stage(layer, 0.5),)) for layer in layers]


def grid(config: ModelConfig, scoring: PrunePlan, firsts: Iterable[int]) -> list[PrunePlan]:
    """Every choice of kept fractions behind the layers ``firsts``, scored as ``scoring`` does."""
    stages = {_stages(config, first, keeps, second): None for first in firsts for keeps in _KEEPS for second in _SECOND}
    return [dataclasses.replace(scoring, stages=one) for one in stages]


def _stages(config: ModelConfig, first: int, keeps: Iterable[float], second: float) -> tuple[Stage, ...]:
    left = config.n_layers - 1 - first
    layers = [first, first + max(1, round(second * left)), first + max(2, round(_THIRD * left))]
    found: dict[int, float] = {}
    for layer, keep in zip(layers, keeps, strict=False):
        found[min(layer, config.n_layers - 2)] = keep  # in a shallow model two cuts may fall together: the deeper wins
    return tuple(Stage(layer, keep) for layer, keep in sorted(found.items()))


def work(config: ModelConfig, plan: PrunePlan, tokens: int) -> float:
    """The arithmetic of a prefill of ``tokens`` under ``plan``, as a fraction of the dense run's.

    Multiply-adds of a layer: the products, D (H + 2 Hkv) Dh + H Dh D + 3 D F for each row, and causal attention, H Dh N
    for each row of N. The scores are left out. Time follows it as far as attention runs at the rate of the products.
    """
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    cut_at = {cut.layer: cut.blocks * plan.block for cut in schedule(plan, tokens)}
    rows, total = tokens, 0.0
    limits = windows(plan, tokens)
    for layer in range(c.n_layers):
        projections = c.d_model * (q + 2 * kv) * rows
        attention: float = q * rows * rows
        if layer in limits.reach:
            saved = [keys_read(0, limits.rows) - keys_read(reach, limits.rows) for reach in limits.reach[layer]]
            attention -= q * 2 * sum(saved) / c.n_kv_heads
        rows = min(rows, cut_at.get(layer, rows))  # the output projection is cheap, and comes before the cut
        total += projections + attention + c.d_model * (q + 3 * c.d_ff) * rows
    dense = tokens * (c.d_model * (2 * q + 2 * kv + 3 * c.d_ff) + q * tokens) * c.n_layers
    return total / dense
