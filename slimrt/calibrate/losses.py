"""What a plan loses, and which plans go on from one round to the next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from slimrt.errors import SettingError
from slimrt.prune.plan import PrunePlan

__all__ = ["Bounds", "Measured", "cheapest_within", "confirmed", "finalists", "survivors"]


@dataclass(frozen=True)
class Bounds:
    """What a preset may lose against the dense run: mean KL and continuation in nats a token, recall as a share, the
    answers to questions in nats of the whole answer, in the mean and (``worst``) any one of them."""

    kl: float
    recall: float
    nll: float
    answer: float = math.inf
    worst: float = math.inf

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value >= 0 or (math.isinf(value) and name not in ("answer", "worst")):
                raise SettingError(f"calibrate: bound {name} {value!r} must be a number of at least 0")


@dataclass(frozen=True)
class Measured:
    """The losses of ``plan`` over ``samples`` prompts: means, and 95 % intervals by paired bootstrap.

    KL is that of quoted and continued text. ``answer_worst``: what the answer that suffers most loses.
    ``work``: its share of the dense run's arithmetic in a prompt of ``LONG`` tokens.
    """

    plan: PrunePlan
    samples: int
    work: float
    kl: float
    recall_drop: float
    recall_interval: tuple[float, float]
    nll_rise: float
    nll_interval: tuple[float, float]
    answer_loss: float = 0.0
    answer_interval: tuple[float, float] = (0.0, 0.0)
    answer_worst: float = 0.0

    def excess(self, bounds: Bounds) -> float:
        """How far outside ``bounds`` it is; at most 0 within them."""
        return max(
            self.kl - bounds.kl,
            self.recall_drop - bounds.recall,
            self.nll_rise - bounds.nll,
            self.answer_loss - bounds.answer,
            self.answer_worst - bounds.worst,
        )

    def is_within(self, bounds: Bounds) -> bool:
        """Whether it keeps ``bounds`` on other text too, as far as can be told: with half a standard error to spare."""
        recall = self.recall_drop + (self.recall_interval[1] - self.recall_drop) / 4
        nll = self.nll_rise + (self.nll_interval[1] - self.nll_rise) / 4
        answer = self.answer_loss + (self.answer_interval[1] - self.answer_loss) / 4
        answers = answer <= bounds.answer and self.answer_worst <= bounds.worst
        return 1.1 * self.kl <= bounds.kl and recall <= bounds.recall and nll <= bounds.nll and answers

    def may_be_within(self, bounds: Bounds) -> bool:
        """Whether more samples could still bring it within ``bounds``."""
        low = Bounds(0.8 * self.kl, max(0, self.recall_interval[0]), max(0, self.nll_interval[0]))
        answers = self.answer_interval[0] <= bounds.answer and self.answer_worst <= bounds.worst
        return low.kl <= bounds.kl and low.recall <= bounds.recall and low.nll <= bounds.nll and answers


def _loss(measured: Measured) -> float:
    """One figure to rank by, where no bound is near."""
    return measured.kl + max(0.0, measured.recall_drop) + max(0.0, measured.nll_rise) + max(0.0, measured.answer_loss)


def survivors(measured: Iterable[Measured], bounds: Bounds, count: int) -> list[PrunePlan]:
    """``count`` plans that may be within ``bounds``: the cheapest, the one that loses least, and some between them."""
    front = _front(sorted(measured, key=lambda one: one.work), bounds)
    if not front:
        return []
    picked = np.unique(np.linspace(0, len(front) - 1, count).round().astype(int))
    return [front[at].plan for at in picked]


def finalists(measured: Iterable[Measured], bounds: Bounds, count: int) -> list[list[PrunePlan]]:
    """``count`` plans around the cheapest that is within ``bounds`` by now, half of them cheaper; then the dearer ones,
    as many at a time."""
    front = _front(sorted(measured, key=lambda one: one.work), bounds)
    within = [at for at, one in enumerate(front) if one.is_within(bounds)]
    first = max(0, min((within[0] if within else len(front)) - count // 2, len(front) - count))
    plans = [one.plan for one in front[first:]]
    return [plans[at : at + count] for at in range(0, len(plans), count)]


def _front(measured: Sequence[Measured], bounds: Bounds) -> list[Measured]:
    """Those that may be within ``bounds`` and lose less than all before them; if none may, what exceeds them least."""
    front: list[Measured] = []
    for one in measured:
        if one.may_be_within(bounds) and (not front or _loss(one) < _loss(front[-1])):
            front.append(one)
    return front or sorted(measured, key=lambda one: one.excess(bounds))[:1]


def cheapest_within(measured: Iterable[Measured], bounds: Bounds) -> Measured | None:
    # Windows that reach over the whole of a short prompt lose nothing and gain nothing.
    within = [one for one in measured if one.is_within(bounds) and one.work < 1]
    return min(within, key=lambda one: one.work, default=None)


def confirmed(measured: Iterable[Measured], bounds: Bounds, again: Callable[[PrunePlan], Measured]) -> Measured | None:
    """The cheapest plan within ``bounds`` that keeps them ``again``, on text that no choice was made by; as measured
    there."""
    within = [one for one in measured if one.is_within(bounds) and one.work < 1]
    for one in sorted(within, key=lambda one: one.work):
        if (found := again(one.plan)).excess(bounds) <= 0:
            return found
    return None
