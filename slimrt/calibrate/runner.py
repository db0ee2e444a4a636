"""Measuring plans on prompts, each pair once, whatever asks for it and however often the program was stopped."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimrt.calibrate.candidates import LONG, work
from slimrt.calibrate.finding import Findings, observe
from slimrt.calibrate.journal import Journal
from slimrt.calibrate.losses import Measured
from slimrt.calibrate.probe import probing
from slimrt.calibrate.rounds import TEXT_TASKS
from slimrt.config import ModelConfig
from slimrt.eval.metrics import bootstrap_interval
from slimrt.eval.sample import Sample
from slimrt.prune.plan import PrunePlan

if TYPE_CHECKING:
    from slimrt.llm import LLM

__all__ = ["Progress", "Runner"]

Progress = Callable[[int, int, str], None]


class Runner:
    """Measures plans on samples, each pair once."""

    def __init__(self, llm: LLM, journal: Journal, layer: int, planned: int, progress: Progress | None) -> None:
        self._llm, self._journal, self._layer = llm, journal, layer
        self._planned, self._progress = planned, progress

    def run(self, plans: Sequence[PrunePlan], samples: Sequence[Sample]) -> list[Measured]:
        """The losses of every plan over all ``samples``, of both tasks; what was measured before is not again."""
        self._measure(plans, samples)
        return [_summary(self._llm.config, plan, samples, self._journal) for plan in plans]

    def observe(self, score: PrunePlan, samples: Sequence[Sample]) -> Findings:
        """What ``score`` finds at its layers of the samples' evidence."""
        for sample in samples:
            if self._journal.get(_name(sample), score) is None:
                self._say(f"{_name(sample)} what each layer finds")
                found = observe(self._llm.engine, sample, score, self._llm.asking(sample.prompt))
                self._journal.add(_name(sample), score, found)
        return Findings(one for sample in samples if (one := self._journal.get(_name(sample), score)))

    def kl(self, plans: Sequence[PrunePlan], samples: Sequence[Sample]) -> list[float]:
        """The mean KL of every plan over all ``samples``."""
        self._measure(plans, samples)
        found = [[self._journal.get(_name(sample), plan) for sample in samples] for plan in plans]
        return [float(np.mean([one["kl"] for one in losses if one])) for losses in found]

    def _measure(self, plans: Sequence[PrunePlan], samples: Sequence[Sample]) -> None:
        for sample in samples:
            name = _name(sample)
            missing = [plan for plan in plans if self._journal.get(name, plan) is None]
            if not missing:
                continue
            self._say(f"{name} dense")
            with probing(self._llm.engine, sample, self._layer, self._llm.asking(sample.prompt)) as probe:
                for plan in missing:
                    self._say(f"{name} {_stages_text(plan)}")
                    self._journal.add(name, plan, probe.measure(plan))

    def _say(self, what: str) -> None:
        if self._progress:
            self._progress(min(len(self._journal), self._planned), self._planned, what)


def _summary(config: ModelConfig, plan: PrunePlan, samples: Sequence[Sample], journal: Journal) -> Measured:
    losses = {sample: journal.get(_name(sample), plan) for sample in samples}
    answers = [one["nats"] for one in losses.values() if one and "nats" in one]
    recall = [one["accuracy"] for sample, one in losses.items() if one and sample.task == "recall"]
    nll = [one["nll"] for sample, one in losses.items() if one and sample.task == "continuation"]
    kl = [one["kl"] for sample, one in losses.items() if one and sample.task in TEXT_TASKS]
    return Measured(
        plan,
        len(samples),
        round(work(config, plan, LONG), 4),
        float(np.mean(kl)),
        float(np.mean(recall)),
        bootstrap_interval(recall),
        float(np.mean(nll)),
        bootstrap_interval(nll),
        float(np.mean(answers)),
        bootstrap_interval(answers),
        max(answers),
    )


def _name(sample: Sample) -> str:
    digest = zlib.crc32(np.asarray(sample.prompt, "<i8").tobytes())
    return f"{sample.task} {len(sample.prompt)} {digest:08x}"


def _stages_text(plan: PrunePlan) -> str:
    parts = [plan.score, *(f"{stage.layer}:{stage.keep:g}" for stage in plan.stages)]
    limited = sum(rows > 0 for window in plan.windows for rows in window.reach)
    return ", ".join([*parts, f"{limited} windows"] if limited else parts)
