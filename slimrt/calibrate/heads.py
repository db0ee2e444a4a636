"""Which heads need not look far back: the layers before the first cut read everything, and there windows save time.

Heads differ more than layers do (retrieval heads and streaming heads: DuoAttention, arXiv 2410.10819), so each KV head
is limited alone, on a few prompts, and ordered by what that loses. Plans are then tried with the windows of the first
few heads, of more, and so on.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from slimrt.config import ModelConfig, PrunePlan, Window

__all__ = ["Head", "alone", "ordered", "with_windows"]

Head = tuple[int, int]  # layer, KV head

REACH = 512
# Of the KL that a plan may lose, what the windows may lose (as the sum of what each head loses alone).
_SHARES = (0.05, 0.15, 0.4)


def alone(config: ModelConfig, scoring: PrunePlan, last_layer: int) -> dict[Head, PrunePlan]:
    """For each KV head of the layers up to ``last_layer`` a plan that limits this head and nothing else."""
    return {
        (layer, head): dataclasses.replace(scoring, stages=(), windows=(_window(config, layer, [head]),))
        for layer in range(last_layer + 1)
        for head in range(config.n_kv_heads)
    }


def ordered(losses: Mapping[Head, float]) -> list[Head]:
    """The heads, those that lose least first."""
    return sorted(losses, key=lambda head: (losses[head], head))


def with_windows(config: ModelConfig, plan: PrunePlan, losses: Mapping[Head, float], bound: float) -> list[PrunePlan]:
    """``plan`` with windows on more and more heads of the layers up to its first cut, for shares of the KL ``bound``.

    ``losses``: the KL that each head loses alone. The plan itself is not among the results.
    """
    heads = [head for head in ordered(losses) if head[0] <= plan.stages[0].layer]
    found: dict[PrunePlan, None] = {}
    totals = list(itertools.accumulate(losses[head] for head in heads))
    for share in _SHARES:
        chosen = heads[: bisect.bisect_right(totals, share * bound)]
        if chosen:
            found[dataclasses.replace(plan, windows=_windows(config, chosen))] = None
    return list(found)


def _windows(config: ModelConfig, heads: Sequence[Head]) -> tuple[Window, ...]:
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return tuple(_window(config, layer, by_layer[layer]) for layer in sorted(by_layer))


def _window(config: ModelConfig, layer: int, heads: Sequence[int]) -> Window:
    return Window(layer, tuple(REACH if head in heads else 0 for head in range(config.n_kv_heads)))
