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

from slimrt.config import ModelConfig, PrunePlan, Window

__all__ = ["VARIANTS", "Head", "head_losses", "with_windows"]

Head = tuple[int, int]  # layer, KV head

_REACHES = (768, 1024)  # rows; heads are compared under the first. Under 512 SmolLM2 quotes a long text less well
_SHARES = (
    0.2,
    0.5,
)  # of the KL that a plan may lose: what the heads under windows may lose in sum, each measured alone
VARIANTS = len(_REACHES) * len(_SHARES)
_QUIET = 0.04  # of that KL: a layer that loses less with all of its heads under windows is not looked at more closely


def head_losses(
    config: ModelConfig,
    scoring: PrunePlan,
    bound: float,
    measure: Callable[[Sequence[PrunePlan]], Iterable[float]],
) -> dict[Head, float]:
    """The KL that each KV head loses under a window, the last layer's excepted (it computes the wanted rows only).

    ``measure`` gives the KL of plans, ``bound`` is what a plan may lose at most.
    """
    layers, every = range(config.n_layers - 1), range(config.n_kv_heads)
    losses = dict(zip(layers, measure([_limited(config, scoring, {layer: every}) for layer in layers]), strict=True))
    found = {(layer, head): losses[layer] / len(every) for layer in layers for head in every}
    loud = [(layer, head) for layer, head in found if losses[layer] > _QUIET * bound]
    alone = measure([_limited(config, scoring, {layer: [head]}) for layer, head in loud])
    return found | dict(zip(loud, alone, strict=True))


def with_windows(config: ModelConfig, plan: PrunePlan, losses: Mapping[Head, float], bound: float) -> list[PrunePlan]:
    """``plan`` with windows on some and on more heads of the layers up to its first cut, nearer and farther ones.

    ``losses``: the KL that each head loses alone, ``bound``: what the plan may lose. The plan itself is not among them.
    """
    last = plan.stages[0].layer if plan.stages else config.n_layers
    heads = sorted((head for head in losses if head[0] <= last), key=lambda head: (losses[head], head))
    totals = list(itertools.accumulate(losses[head] for head in heads))
    found: dict[PrunePlan, None] = {}
    for share in _SHARES:
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads[: bisect.bisect_right(totals, share * bound)]:
            by_layer.setdefault(layer, []).append(head)
        for reach in _REACHES if by_layer else ():
            windows = tuple(_window(config, layer, by_layer[layer], reach) for layer in sorted(by_layer))
            found[dataclasses.replace(plan, windows=windows)] = None
    return list(found)


def _limited(config: ModelConfig, scoring: PrunePlan, heads: Mapping[int, Sequence[int]]) -> PrunePlan:
    """A plan that limits these heads of these layers and does nothing else."""
    windows = tuple(_window(config, layer, heads[layer], _REACHES[0]) for layer in sorted(heads))
    return dataclasses.replace(scoring, stages=(), windows=windows)


def _window(config: ModelConfig, layer: int, heads: Sequence[int], reach: int) -> Window:
    return Window(layer, tuple(reach if head in heads else 0 for head in range(config.n_kv_heads)))
