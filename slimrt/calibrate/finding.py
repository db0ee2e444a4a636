"""What the score finds at each layer: how far down its ranking that stands which a prompt asks for or quotes.

One dense run tells it for every layer, so many layers and fractions are compared at little cost before the first plan
runs: a plan that drops what the answer is taken from cannot be good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slimrt.engine import Engine
from slimrt.eval.metrics import accuracy
from slimrt.eval.sample import Sample
from slimrt.ops.protocol import Array
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.schedule import Schedule, schedule
from slimrt.prune.select import ranking

__all__ = ["Findings", "observe"]

_ACCURACY, _BEFORE = "accuracy", "before"
_FOUND = 0.05  # of the answers: a layer that loses no more of them than the best one and this knows what was asked


class _Observer:
    """Follows a prefill that keeps everything (``slimrt.context.Trace``): the share of the blocks, by layer, that must
    go on for the blocks of the rows ``wanted`` to be among them."""

    def __init__(self, rule: Schedule, wanted: Sequence[int]) -> None:
        self.shares: dict[int, float] = {}
        self._rule, self._blocks = rule, sorted({row // rule.plan.block for row in wanted})

    def begin(self) -> None:
        """Nothing to see."""

    def attention(self, layer: int, q: Array, keys: Array) -> None:
        """Nothing to see."""

    def cut(
        self, layer: int, positions: np.ndarray, scores: np.ndarray, rows: np.ndarray, by: np.ndarray | None
    ) -> None:
        """The ranks of the wanted blocks under these scores."""
        ranked = ranking(self._rule, scores, len(positions))
        last = np.flatnonzero(np.isin(ranked, self._blocks))[-1]
        self.shares[layer] = (int(last) + 1) / len(ranked)

    def layer(self, layer: int) -> None:
        """Nothing to see."""


def observe(engine: Engine, sample: Sample, plan: PrunePlan, asked: Asked | None = None) -> dict[str, float]:
    """By layer (its number as text) the share of the prompt that must go on there for the sample's evidence to be kept.

    ``plan`` scores at its stages and keeps everything; ``sample`` has evidence; ``asked``: which of its tokens ask.
    "accuracy": of the dense run on the continuation; "before": 1 where a question stands before the document.
    """
    assert plan.keeps_all and sample.evidence
    rule = schedule(plan, len(sample.prompt), asked)
    observer = _Observer(rule, sample.evidence)
    context = engine.new_context()
    try:
        hidden, _ = engine.prefill(context, sample.prompt, rule, trace=observer)
        following = (*sample.forced, *sample.continuation)[:-1]
        rest = [engine.extend(context, following, wanted=len(following))] if following else []
        logits = engine.logits(np.concatenate([hidden, *rest]))[len(sample.forced) :]
    finally:
        context.cache.close()
    found = float(accuracy(logits, sample.continuation).mean())
    before = float(asked is not None and asked.before)
    return {str(layer): share for layer, share in observer.shares.items()} | {_ACCURACY: found, _BEFORE: before}


class Findings:
    """What ``observe`` saw on several samples."""

    def __init__(self, observed: Iterable[Mapping[str, float]]) -> None:
        observed = list(observed)
        self._accuracy = np.array([one[_ACCURACY] for one in observed])
        self._before = np.array([one[_BEFORE] for one in observed], bool)
        layers = [name for name in observed[0] if name not in (_ACCURACY, _BEFORE)]
        self._shares = {int(layer): np.array([one[layer] for one in observed]) for layer in layers}

    def loss(self, stages: Sequence[Stage], late: int = 0) -> float:
        """The share of right tokens that ``stages`` (fractions) must be expected to cost; ``late``: as in the plan.

        An answer whose evidence is dropped counts in full; one that is kept by a narrow margin counts for what it may
        cost on another prompt: the square of how much of the kept share was needed.
        """
        needed = [
            self._shares[stage.layer] / stage.keep * (~self._before if stage.layer < late else 1.0) for stage in stages
        ]
        return float(np.mean(self._accuracy * np.minimum(1.0, np.max(needed, axis=0)) ** 2))

    def layers(self, keep: float, count: int) -> list[int]:
        """The ``count`` layers at which a cut to ``keep`` costs least, ascending; questions before the document, which
        early layers do not know, are left to ``late``."""
        shares, behind = self._shares, ~self._before

        def loss(layer: int) -> tuple[float, float]:
            return self.loss([Stage(layer, keep)], late=layer + 1), float(shares[layer][behind].mean())

        return sorted(sorted(shares, key=loss)[:count])

    def late(self, keep: float) -> int:
        """The first layer at which a question before the document is known: where a cut to ``keep`` finds about as much
        as at the best layer. 0 where no such question was seen."""
        if not self._before.any():
            return 0
        asked = self._before
        losses = {
            layer: float(np.mean(self._accuracy[asked] * np.minimum(1.0, shares[asked] / keep) ** 2))
            for layer, shares in self._shares.items()
        }
        best = min(losses.values())
        return min(layer for layer, loss in losses.items() if loss <= best + _FOUND)
