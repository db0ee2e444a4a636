"""Which heads need not look far back: the layers before the first cut read everything, and there windows save time.

Heads differ more than layers do (retrieval heads and streaming heads: DuoAttention, arXiv 2410.10819). So layers are
limited one by one, on a few prompts, and where that loses something each KV head alone. Plans are then tried with
windows on the heads that lose least, and on more of them.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from slimrt.config import ModelConfig
from slimrt.prune.plan import PrunePlan, Window

__all__ = ["REACH", "SHARES", "Head", "head_losses", "quiet", "with_windows"]

Head = tuple[int, int]  # layer, KV head

REACH = 1024  # rows. Under 512 SmolLM2 quotes a long text less well, under 768 it continues one less well
_COMPARED = 768  # rows: how far heads look back when they are compared, on prompts that are not so long
SHARES = (0.1, 0.25)  # of the KL that a plan may lose: what all its heads under windows may lose in sum, each alone
_QUIET = 0.04  # of that KL: a layer that loses less with all of its heads under windows is not looked at more closely


def head_losses(
    config: ModelConfig,
    scoring: PrunePlan,
    bound: float,
    measure: Callable[[Sequence[PrunePlan]], Iterable[float]],
) -> dict[Head, float]:
    """The KL that each KV head loses under a window, the last layer's excepted (it computes the wanted rows only),
    and those of layers that have a window of their own.

    ``measure`` gives the KL of plans, ``bound`` is what a plan may lose at most.
    """
    layers = [layer for layer in config.sees_all() if layer < config.n_layers - 1]
    every = range(config.n_kv_heads)
    losses = dict(zip(layers, measure([_limited(config, scoring, {layer: every}) for layer in layers]), strict=True))
    found = {(layer, head): losses[layer] / len(every) for layer in layers for head in every}
    loud = [(layer, head) for layer, head in found if losses[layer] > _QUIET * bound]
    alone = measure([_limited(config, scoring, {layer: [head]}) for layer, head in loud])
    return found | dict(zip(loud, alone, strict=True))


def quiet(losses: Mapping[Head, float], allowed: float) -> list[Head]:
    """The heads that lose least: as many as lose ``allowed`` nats in sum."""
    heads = sorted(losses, key=lambda head: (losses[head], head))
    totals = list(itertools.accumulate(losses[head] for head in heads))
    return heads[: bisect.bisect_right(totals, allowed)]


def with_windows(config: ModelConfig, plan: PrunePlan, heads: Iterable[Head]) -> PrunePlan:
    """``plan`` with windows on those of ``heads`` that lie in layers up to its first cut."""
    last = plan.stages[0].layer if plan.stages else config.n_layers
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if layer <= last:
            by_layer.setdefault(layer, []).append(head)
    windows = tuple(_window(config, layer, by_layer[layer], REACH) for layer in sorted(by_layer))
    return dataclasses.replace(plan, windows=windows)


def _limited(config: ModelConfig, scoring: PrunePlan, heads: Mapping[int, Sequence[int]]) -> PrunePlan:
    """A plan that limits these heads of these layers and does nothing else."""
    windows = tuple(_window(config, layer, heads[layer], _COMPARED) for layer in sorted(heads))
    return dataclasses.replace(scoring, stages=(), windows=windows)


def _window(config: ModelConfig, layer: int, heads: Sequence[int], reach: int) -> Window:
    return Window(layer, tuple(reach if head in heads else 0 for head in range(config.n_kv_heads)))
