"""What an evaluation found: every value of every sample, paired summaries, time to first token, the Pareto front."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.errors import SettingError
from slimrt.eval.metrics import CONFIDENCE, RESAMPLES, bootstrap_interval
from slimrt.output import write_atomically

__all__ = [
    "DENSE",
    "HIGHER_IS_BETTER",
    "QUESTIONS",
    "RULER_MEAN",
    "EvalReport",
    "Result",
    "Summary",
    "Timing",
    "front",
    "merged",
    "read_report",
]

DENSE = "dense"
RULER_MEAN = "ruler"  # the summary over all of RULER's tasks
QUESTIONS = "questions"  # that over all tasks with an answer behind a forced opening
HIGHER_IS_BETTER = {"score": True, "accuracy": True, "nats": False, "nll": False, "kl": False}
# What a plan may lose and still count as no worse than dense: the bounds of the preset ``auto``.
MARGINS = {"score": 0.05, "accuracy": 0.01, "nats": 0.3, "nll": 0.02, "kl": 0.05}

_RUNS_APART = 1_000_000  # numbers of samples and clusters between those of merged runs


@dataclass(frozen=True)
class Result:
    """One sample under one plan. ``metrics``: means over the continuation, or the score of the drawn ``answer``.
    ``cluster``: samples of a task with the same number share text."""

    length: int
    task: str
    index: int
    plan: str
    metrics: Mapping[str, float]
    answer: str | None = None
    references: tuple[str, ...] = ()
    cluster: int = 0


@dataclass(frozen=True)
class Timing:
    """Time to first token of one plan at one prompt length, one figure a repeat, and what the plan left behind.

    ``stages``: tokens kept after each cut, empty where the prompt ran dense. ``kv_bytes``: keys and values afterwards.
    """

    length: int
    plan: str
    ttft_s: tuple[float, ...]
    stages: tuple[int, ...]
    kv_bytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.ttft_s)


@dataclass(frozen=True)
class Summary:
    """One metric of one task: the plan's mean, the dense run's, and the mean of the paired differences (plan - dense).

    ``low`` and ``high`` bound the mean difference (95 %, percentile bootstrap over the ``clusters`` of the ``n``
    samples). A loss is a difference to the worse: ``at_most`` is the one-sided 95 % bound of its mean, ``margin`` what
    would still count as none, ``worst_tenth`` the mean over the worst tenth of the samples (at least one), ``worst``
    the greatest.
    """

    length: int
    task: str
    metric: str
    plan: str
    n: int
    mean: float
    dense: float
    difference: float
    low: float
    high: float
    clusters: int
    at_most: float
    margin: float
    worst_tenth: float
    worst: float

    @property
    def no_worse(self) -> bool:
        """Whether the plan is shown to be no worse than dense by more than the margin (one-sided 95 %)."""
        return self.clusters > 1 and self.at_most <= self.margin

    @property
    def verdict(self) -> str:
        """What the whole interval says about the plan against dense, "worse" or "better", else empty.

        The KL to the dense run has no better side than zero: its size is to be judged, not its sign.
        """
        if self.metric == "kl" or self.clusters < 2 or self.low <= 0 <= self.high:
            return ""
        return "better" if (self.low > 0) == HIGHER_IS_BETTER[self.metric] else "worse"


@dataclass(frozen=True)
class EvalReport:
    """``plans`` maps a plan's name to what it is: its settings, or null for a dense run, and where it comes from."""

    model: str
    version: str
    text: Mapping[str, str]
    seed: int
    samples: int
    plans: Mapping[str, Mapping[str, Any]]
    ruler_tasks: tuple[str, ...]
    results: tuple[Result, ...]
    timings: tuple[Timing, ...]

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Every metric of every task at every length, plan by plan; RULER's tasks also taken together."""
        groups: dict[tuple[int, str, str, str], dict[tuple[str, int], float]] = {}
        clusters: dict[tuple[str, int], tuple[str, int]] = {}
        asking = {result.task for result in self.results if "nats" in result.metrics}
        for result in self.results:
            pools = [RULER_MEAN] if result.task in self.ruler_tasks else []
            if result.task in asking and len(asking) > 1:
                pools.append(QUESTIONS)
            for task in (result.task, *pools):
                for metric, value in result.metrics.items():
                    values = groups.setdefault((result.length, task, metric, result.plan), {})
                    values[result.task, result.index] = value
                    clusters[result.task, result.index] = (result.task, result.cluster)
        summaries = [
            _summary(length, task, metric, plan, values, groups[length, task, metric, DENSE], clusters)
            for (length, task, metric, plan), values in groups.items()
            if plan != DENSE
        ]
        # Groups appear as the work went; tasks read better together, the mean behind its parts.
        tasks = [*dict.fromkeys(result.task for result in self.results), QUESTIONS, RULER_MEAN]
        measures = [*HIGHER_IS_BETTER]
        return tuple(sorted(summaries, key=lambda row: (row.length, tasks.index(row.task), measures.index(row.metric))))

    def timing(self, length: int, plan: str) -> Timing:
        """Raises KeyError if there is none."""
        for timing in self.timings:
            if (timing.length, timing.plan) == (length, plan):
                return timing
        raise KeyError((length, plan))

    def speedup(self, timing: Timing) -> float:
        """The dense run's median time to first token over this one's."""
        return self.timing(timing.length, DENSE).median_s / timing.median_s

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the summary first, then all values."""
        return {
            "model": self.model,
            "slimrt": self.version,
            "text": dict(self.text),
            "seed": self.seed,
            "samples": self.samples,
            "interval": f"{CONFIDENCE:.0%} percentile bootstrap of the mean paired difference, {RESAMPLES} resamples",
            "plans": {name: dict(plan) for name, plan in self.plans.items()},
            "summary": [
                dataclasses.asdict(row) | {"verdict": row.verdict, "no_worse": row.no_worse} for row in self.summaries
            ],
            "ttft": [
                dataclasses.asdict(timing) | {"median_s": timing.median_s, "speedup": self.speedup(timing)}
                for timing in self.timings
            ],
            "results": [dataclasses.asdict(result) for result in self.results],
        }

    def save_json(self, path: str | Path) -> None:
        """Write ``to_dict``, whole or not at all. Raises OSError."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_report(path: str | Path) -> EvalReport:
    """A report that ``save_json`` wrote. Raises SettingError for a file that cannot be read or is none."""
    try:
        data = json.loads(Path(path).read_bytes())
        return EvalReport(
            model=data["model"],
            version=data["slimrt"],
            text=data["text"],
            seed=data["seed"],
            samples=data["samples"],
            plans=data["plans"],
            ruler_tasks=tuple(dict.fromkeys(one["task"] for one in data["results"] if "score" in one["metrics"])),
            results=tuple(Result(**{**one, "references": tuple(one["references"])}) for one in data["results"]),
            timings=tuple(
                Timing(one["length"], one["plan"], tuple(one["ttft_s"]), tuple(one["stages"]), one["kv_bytes"])
                for one in data["ttft"]
            ),
        )
    except OSError as error:
        raise SettingError(f"report '{path}': {error.strerror}; name a file that slimrt eval -o wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"report '{path}': not a report of slimrt eval ({error}); name a file that it wrote"
        ) from None


def merged(reports: Sequence[EvalReport]) -> EvalReport:
    """Several runs of the same model and plans as one, such as those of other texts or seeds.

    Samples of different runs count as sharing no text: windows of one long text that other seeds drew overlap by
    chance only. Raises SettingError where a run has another model, or other plans, or the samples of an earlier one.
    """
    first = reports[0]
    results: list[Result] = []
    timings: dict[tuple[int, str], Timing] = {}
    seen: set[tuple[Any, ...]] = set()
    for number, report in enumerate(reports):
        if (report.model, dict(report.plans)) != (first.model, dict(first.plans)):
            raise SettingError(
                f"reports: number {number + 1} is of model {report.model} with plans {', '.join(report.plans)}, "
                f"the first of {first.model} with {', '.join(first.plans)}; take runs of the same model and plans"
            )
        for one in report.results:
            key = (report.text["sha256"], report.seed, one.length, one.task, one.index, one.plan)
            if key in seen:
                raise SettingError(
                    f"reports: number {number + 1} repeats the samples of an earlier one (text {report.text['name']}, "
                    f"seed {report.seed}); give each run a seed or a text of its own"
                )
            seen.add(key)
            apart = number * _RUNS_APART
            results.append(dataclasses.replace(one, index=one.index + apart, cluster=one.cluster + apart))
        for timing in report.timings:
            place = timing.length, timing.plan
            before = timings.get(place)
            ttft = (before.ttft_s if before else ()) + timing.ttft_s
            timings[place] = dataclasses.replace(timing, ttft_s=ttft)
    return dataclasses.replace(
        first,
        text={
            "name": ", ".join(dict.fromkeys(report.text["name"] for report in reports)),
            "sha256": ", ".join(dict.fromkeys(report.text["sha256"] for report in reports)),
        },
        samples=sum(report.samples for report in reports),
        ruler_tasks=tuple(dict.fromkeys(task for report in reports for task in report.ruler_tasks)),
        results=tuple(results),
        timings=tuple(timings.values()),
    )


def _summary(
    length: int,
    task: str,
    metric: str,
    plan: str,
    values: Mapping[tuple[str, int], float],
    dense: Mapping[tuple[str, int], float],
    clusters: Mapping[tuple[str, int], tuple[str, int]],
) -> Summary:
    pairs = np.array([(value, dense[sample]) for sample, value in values.items()])
    differences = pairs[:, 0] - pairs[:, 1]
    of = [clusters[sample] for sample in values]
    low, high = bootstrap_interval(differences, clusters=of)
    losses = np.sort(-differences if HIGHER_IS_BETTER[metric] else differences)
    one_sided = 1 - 2 * (1 - CONFIDENCE)
    bounds = bootstrap_interval(differences, clusters=of, confidence=one_sided)
    mean, mean_dense = pairs.mean(axis=0)
    return Summary(
        length, task, metric, plan, len(pairs), float(mean), float(mean_dense), float(differences.mean()), low, high,
        clusters=len(set(of)),
        at_most=-bounds[0] if HIGHER_IS_BETTER[metric] else bounds[1],
        margin=MARGINS[metric],
        worst_tenth=float(losses[-max(1, len(losses) // 10) :].mean()),
        worst=float(losses[-1]),
    )  # fmt: skip


def front(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (both coordinates: less is better) no other point beats, being no worse in both."""
    return [not any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in costs) for a in costs]
