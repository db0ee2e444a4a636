"""What the scores of each layer would find: how far down their ranking the passage stands that a prompt quotes.

One dense run tells it for every layer, so many layers and fractions are compared at little cost before the first plan
runs: a plan that drops what the answer is copied from cannot be good. Quotations are the hardest case, for which few
heads in few layers look far back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slimrt.engine import Engine
from slimrt.eval.metrics import accuracy
from slimrt.eval.sample import Sample
from slimrt.ops.protocol import Array
from slimrt.prune.plan import PrunePlan, Stage
from slimrt.prune.schedule import Schedule, schedule
from slimrt.prune.select import ranking

__all__ = ["Findings", "observe"]

_ACCURACY = "accuracy"


class _Observer:
    """Follows a prefill that keeps everything (``slimrt.engine.Trace``): the share of the blocks, by layer, that must
    go on for the blocks of the rows ``wanted`` to be among them."""

    def __init__(self, rule: Schedule, wanted: range) -> None:
        self.shares: dict[int, float] = {}
        block = rule.plan.block
        self._rule, self._blocks = rule, range(wanted[0] // block, wanted[-1] // block + 1)

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


def observe(engine: Engine, sample: Sample, plan: PrunePlan) -> dict[str, float]:
    """By layer (its number as text) the share of the prompt that must go on there for the quoted passage to be kept.

    ``plan`` scores at its stages and keeps everything; ``sample`` quotes. "accuracy": of the dense run on
    the quotation.
    """
    assert plan.keeps_all and sample.quoted is not None
    rule = schedule(plan, len(sample.prompt))
    observer = _Observer(rule, range(sample.quoted, sample.quoted + len(sample.continuation)))
    context = engine.new_context()
    try:
        hidden, _ = engine.prefill(context, sample.prompt, rule, trace=observer)
        following = sample.continuation[:-1]
        rest = engine.extend(context, following, wanted=len(following))
        logits = engine.logits(np.concatenate([hidden, rest]))
    finally:
        context.cache.close()
    found = float(accuracy(logits, sample.continuation).mean())
    return {str(layer): share for layer, share in observer.shares.items()} | {_ACCURACY: found}


class Findings:
    """What ``observe`` saw on several samples."""

    def __init__(self, observed: Iterable[Mapping[str, float]]) -> None:
        observed = list(observed)
        self._accuracy = np.array([one[_ACCURACY] for one in observed])
        layers = [name for name in observed[0] if name != _ACCURACY]
        self._shares = {int(layer): np.array([one[layer] for one in observed]) for layer in layers}

    def loss(self, stages: Sequence[Stage]) -> float:
        """The recall that ``stages`` (fractions) must be expected to cost.

        A quotation whose passage is dropped counts in full; one that is kept by a narrow margin counts for what it may
        cost on another prompt: the square of how much of the kept share was needed.
        """
        needed = [self._shares[stage.layer] / stage.keep for stage in stages]
        return float(np.mean(self._accuracy * np.minimum(1.0, np.max(needed, axis=0)) ** 2))

    def layers(self, keep: float, count: int) -> list[int]:
        """The ``count`` layers at which a cut to ``keep`` costs least, ascending."""
        shares = self._shares
        by_loss = sorted(shares, key=lambda layer: (self.loss([Stage(layer, keep)]), shares[layer].mean()))
        return sorted(by_loss[:count])
