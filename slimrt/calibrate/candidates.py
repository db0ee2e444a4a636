"""Which plans are tried, and how much of the dense run's arithmetic each of them does. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from slimrt.calibrate.finding import Findings
from slimrt.config import ModelConfig
from slimrt.errors import SettingError
from slimrt.prune.asked import ASKED
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.reach import keys_read
from slimrt.prune.schedule import schedule

__all__ = ["LONG", "MIN_TOKENS", "RECOMPUTED", "candidates", "first_layer", "recomputed", "scoring", "work"]

MIN_TOKENS = 1024  # shorter prompts are read in little time anyway, and were not measured
LONG = 8192  # tokens of the prompts that plans are compared by

# Of the layers: where cuts are tried. Layers differ much in how well their attention tells what will be wanted.
_EARLIEST, _LATEST = 0.2, 0.8
_STAGE_LAYERS = 9  # of those, the ones that find best
_KEEPS = (0.75, 0.67, 0.5, 0.4, 0.33, 0.25, 0.17, 0.125)
_STAGES = 3  # at most
_KEPT_BEHIND = 0.5  # what a cut keeps by which layers are judged that know a question before the document
# What a prompt in doubt gets (see PrunePlan). A block that answers a question scored .85 to .99 at the layers that find
# it; of SmolLM2's presets one has .85 and .7, the other .75 and .5 (docs/experiments.md).
_SURE, _MOST = 0.8, 0.6
_LEAST_SAVED = 0.9  # of the dense run's arithmetic: plans that do more are not worth a loss
# A further question computes what lies behind the first cut again: a plan whose later layers do more than this share of
# its work would be quick once, and slow ever after.
RECOMPUTED = 0.5
# Candidates are spread over what they cost, and in each range over first layers and numbers of cuts.
_BINS, _KINDS = 7, 5


def first_layer(config: ModelConfig) -> int:
    """The earliest layer that any candidate cuts at. Raises SettingError for a model too shallow to be cut."""
    if config.n_layers < 4:
        raise SettingError(f"calibrate: this model has {config.n_layers} layers, at least 4 are needed to prune it")
    earliest = max(1, round(_EARLIEST * config.n_layers))
    # A layer with a window of its own cannot tell what is wanted.
    layers = [layer for layer in config.sees_all() if 1 <= layer < config.n_layers - 1]
    if not layers:
        raise SettingError(
            "calibrate: no layer of this model before its last sees everything, and only such a layer can tell which "
            "blocks are wanted; it runs with prune='off'"
        )
    return next((layer for layer in layers if layer >= earliest), layers[-1])


def scoring(config: ModelConfig) -> PrunePlan:
    """The score ``asked`` at every layer that may be cut at; the plan keeps everything.

    The published scores take the last queries, whatever these ask: no plan that is found by quotations at a prompt's
    very end holds for prompts as people write them. They remain for plans of one's own.
    """
    last = max(first_layer(config), min(round(_LATEST * config.n_layers), config.n_layers - 2))
    inside = (layer for layer in config.sees_all() if first_layer(config) <= layer <= last)
    stages = tuple(Stage(layer, 1.0) for layer in inside)
    return PrunePlan(stages, score=ASKED, min_tokens=MIN_TOKENS)


def candidates(
    config: ModelConfig,
    scoring: PrunePlan,
    findings: Findings,
    shortest: int,
    limited: Callable[[PrunePlan], PrunePlan],
) -> list[PrunePlan]:
    """Cuts that can be expected to lose little, from the cheapest kind to the dearest.

    ``scoring``: whose score they take, ``findings``: what it found, ``shortest``: tokens of the shortest prompts that
    they will be measured on, ``limited``: gives a plan windows.
    """
    late = findings.late(_KEPT_BEHIND)
    doubt = dataclasses.replace(scoring, sure=_SURE, most=_MOST)
    layers = findings.layers(min(_KEEPS[:-2]), _STAGE_LAYERS)
    choices = [
        tuple(map(Stage, at, keeps))
        for count in range(1, _STAGES + 1)
        for at in itertools.combinations(layers, count)
        for keeps in itertools.combinations(_KEEPS, count)
    ]
    plans = [
        limited(
            dataclasses.replace(
                doubt,
                stages=stages,
                min_keep=_least(stages, shortest),
                late=late if stages[0].layer < late else 0,
            )
        )
        for stages in choices
    ]
    costs = [(work(config, plan, LONG), plan) for plan in plans if recomputed(config, plan, LONG) <= RECOMPUTED]
    costs = [(cost, plan) for cost, plan in costs if cost <= _LEAST_SAVED]
    if not costs:
        return []
    low = min(cost for cost, _ in costs)
    bins: list[list[PrunePlan]] = [[] for _ in range(_BINS)]
    for cost, plan in costs:
        bins[min(_BINS - 1, int((cost - low) / (_LEAST_SAVED - low + 1e-9) * _BINS))].append(plan)
    return [plan for one in bins for plan in _best(one, findings)]


def _least(stages: Sequence[Stage], shortest: int) -> int:
    """What the last stage keeps of a prompt of ``shortest`` tokens: shorter ones, unmeasured, keep no fewer."""
    return math.ceil(stages[-1].keep * shortest)


def _best(plans: Iterable[PrunePlan], findings: Findings) -> list[PrunePlan]:
    """The best of ``plans`` of each of ``_KINDS`` kinds."""
    found: dict[tuple[int, int], PrunePlan] = {}
    for plan in sorted(plans, key=lambda plan: (findings.loss(plan.stages, plan.late), len(plan.stages))):
        found.setdefault((plan.stages[0].layer, len(plan.stages)), plan)
    return list(found.values())[:_KINDS]


def work(config: ModelConfig, plan: PrunePlan, tokens: int) -> float:
    """The arithmetic of a prefill of ``tokens`` under ``plan``, as a fraction of the dense run's.

    Multiply-adds of a layer: the products, D (H + 2 Hkv) Dh + H Dh D + 3 D F for each row, and causal attention, H Dh N
    for each row of N. The scores are left out. Time follows it as far as attention runs at the rate of the products.
    """
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    dense = tokens * (c.d_model * (2 * q + 2 * kv + 3 * c.d_ff_computed)) * c.n_layers
    dense += sum(q * tokens * _seen(c, layer, tokens) for layer in range(c.n_layers))
    return sum(_by_layer(config, plan, tokens)) / dense


def recomputed(config: ModelConfig, plan: PrunePlan, tokens: int) -> float:
    """The share of a plan's own arithmetic that lies behind its first cut: what a further question does again."""
    if not plan.stages:
        return 0.0
    by_layer = _by_layer(config, plan, tokens)
    return sum(by_layer[plan.stages[0].layer + 1 :]) / sum(by_layer)


def _seen(config: ModelConfig, layer: int, rows: int) -> int:
    """Twice the keys that each of so many rows sees on average: half of them, or a window."""
    return min(rows, 2 * config.window(layer) or rows)


def _by_layer(config: ModelConfig, plan: PrunePlan, tokens: int) -> list[float]:
    """Multiply-adds of each layer."""
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    rule = schedule(plan, tokens)
    cut_at, limits = {cut.layer: cut.blocks * plan.block for cut in rule.cuts}, rule.windows
    rows, found = tokens, []
    for layer in range(c.n_layers):
        projections = c.d_model * (q + 2 * kv) * rows
        attention: float = q * rows * _seen(c, layer, rows)
        if layer in limits.reach:
            saved = [_keys(0, limits.rows) - _keys(reach, limits.rows) for reach in limits.reach[layer]]
            attention -= q * 2 * sum(saved) / c.n_kv_heads
        rows = min(rows, cut_at.get(layer, rows))  # the output projection is cheap, and comes before the cut
        found.append(projections + attention + c.d_model * (q + 3 * c.d_ff_computed) * rows)
    return found


_keys = cache(keys_read)
