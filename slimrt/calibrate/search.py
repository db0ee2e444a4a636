"""The search: what the score finds at each layer, which heads need not look far, then plans, in rounds of fewer plans
and more text; the last word has text that no choice was made by."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimrt import __version__
from slimrt.calibrate.candidates import (
    LONG,
    MIN_TOKENS,
    RECOMPUTED,
    candidates,
    first_layer,
    recomputed,
    scoring,
    work,
)
from slimrt.calibrate.finding import Findings, observe
from slimrt.calibrate.heads import SHARES, head_losses, quiet, with_windows
from slimrt.calibrate.journal import Journal
from slimrt.calibrate.probe import probing
from slimrt.config import ModelConfig
from slimrt.errors import ContextError, SettingError
from slimrt.eval.metrics import bootstrap_interval
from slimrt.eval.run import context_needed, time_to_first_token
from slimrt.eval.sample import Sample, Source
from slimrt.eval.tasks import TASKS
from slimrt.eval.tasks import samples as task_samples
from slimrt.eval.text import Corpus, load_corpus
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import PRESETS, fingerprint

if TYPE_CHECKING:
    from slimrt.llm import LLM

__all__ = ["Bounds", "Calibration", "Measured", "calibrate", "calibration_context"]

Progress = Callable[[int, int, str], None]

_TASKS = ("recall", "continuation")
# Questions as people put them: behind a document and before it, with instructions, a schema or examples behind them.
_ASKING = (
    "ask_brief", "ask_first", "ask_schema", "ask_several", "ask_rules", "ask_system", "quote", "ask_examples",
    "ask_first_reminder", "ask_form", "ask_about", "ask_raw",
)  # fmt: skip
_ALL = (*_TASKS, *_ASKING)
_ROUNDS = (0.2, 0.3, 0.5)  # of the samples; each round measures the plans that the one before left
_OBSERVED = 24  # prompts on which layers are compared
_QUESTIONS = 2  # prompts on one document that `auto` cuts; a third one is better off with all of it (PrunePlan)
_FIRST_PLANS = 35  # about as many as the first round has
_LONGER = 2  # times as long are the prompts of the last round, where the context allows: windows cost the more there
_SURVIVORS = (4, 4)  # plans a preset that a round leaves
_HEAD_SAMPLES = 2  # on which layers and heads are limited alone: quotations, for which heads look back the farthest
_TTFT_REPEATS = 3


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


@dataclass(frozen=True)
class Calibration:
    """The presets found (None: no plan is within the bounds, so dense) and everything that was measured for them."""

    model: dict[str, Any]
    bounds: dict[str, Bounds]
    presets: dict[str, Measured | None]
    measured: tuple[Measured, ...]
    ttft_s: dict[str, tuple[float, ...]]  # of "dense" and the presets, on one of the prompts, measured in turns
    lengths: tuple[int, int]  # of the prompts, but for the last round, and in it
    seed: int
    text: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The file's content, as ``slimrt.prune.presets`` reads it."""
        presets = {}
        for name, found in self.presets.items():
            entry: dict[str, Any] = {"plan": dataclasses.asdict(found.plan if found else PrunePlan())}
            entry["bounds"] = dataclasses.asdict(self.bounds[name])
            if found:
                entry["measured"] = _without_plan(found)
                entry["ttft_s"] = {"dense": self.ttft_s["dense"], "plan": self.ttft_s[name]}
            presets[name] = entry
        settings = {"version": __version__, "lengths": self.lengths, "seed": self.seed, "text": self.text}
        return {
            "model": self.model,
            "presets": presets,
            "calibration": {**settings, "measured": [dataclasses.asdict(one) for one in self.measured]},
        }


def _without_plan(measured: Measured) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(measured).items() if name != "plan"}


def calibration_context(length: int, trained: int) -> int:
    """The context that a model is best loaded with to be calibrated on prompts of ``length``: enough for the longer
    prompts of the last round, unless it was ``trained`` on less."""
    return max(context_needed(_ALL, [length]), min(context_needed(_ALL, [_LONGER * length]), trained))


def calibrate(
    llm: LLM,
    bounds: dict[str, Bounds],
    journal_path: Path,
    *,
    length: int = 3000,
    samples: int = 48,
    seed: int = 0,
    text: Path | None = None,
    progress: Progress | None = None,
    begun: Callable[[Journal], None] | None = None,
) -> tuple[Calibration, Journal]:
    """Find, for each preset of ``bounds``, the plan that does least arithmetic of those within its bounds.

    ``samples`` prompts of ``length`` tokens, those of the last round up to twice as long where the context holds them,
    recall, continuation and questions in turns, are drawn from the first half of ``text`` (default: Python's own
    documentation). What is reported of a preset, and must keep its bounds, is measured on the second half, on as many
    prompts as the last round has. Measurements go to
    a file beside ``journal_path``, one for each choice of settings, as they are made, and are read from there if they
    were made before; ``begun`` is called with that journal, and the caller removes it when the result is stored.
    ``progress`` is called with (measurements done, measurements planned, what comes next).

    Raises SettingError for settings out of range, ContextError where prompts exceed the context: before any work.
    """
    needed = context_needed(_ALL, [length])
    if needed > llm.ctx:
        raise ContextError(f"prompts of {length} tokens and their answers take {needed}, the context holds {llm.ctx}")
    if samples < 8:
        raise SettingError(f"samples {samples}: must be at least 8, 40 or more to be trusted")
    config, layer = llm.config, first_layer(llm.config)
    if length < MIN_TOKENS:
        raise SettingError(
            f"length {length}: must be at least {MIN_TOKENS}, shorter prompts run dense under every plan"
        )
    corpus = load_corpus(llm.tokenizer, text)
    half, chat = len(corpus.tokens) // 2, llm.chat_tokens if llm.has_chat_template else None
    source, unseen = (
        Source(llm.tokenizer, Corpus(corpus.name, corpus.sha256, tokens), chat)
        for tokens in (corpus.tokens[:half], corpus.tokens[half:])
    )
    longest = min(_LONGER * length, length + llm.ctx - needed)
    drawn = _drawn(source, length, samples, seed)
    header = {
        "version": __version__,
        "model": fingerprint(llm.file, config, llm.engine.adapters),
        "bytes": llm.file.path.stat().st_size,
        "text": corpus.sha256,
        "lengths": [length, longest],
        "samples": samples,
        "seed": seed,
    }
    journal = Journal(journal_path, header)
    if begun is not None:
        begun(journal)
    rounds = _rounds(drawn)
    observed = [sample for sample in drawn if sample.evidence][:_OBSERVED]
    quotations = [sample for sample in drawn if sample.task == "recall"][:_HEAD_SAMPLES]
    if longest > length:
        rounds[-1] = _drawn(source, longest, len(rounds[-1]), seed)
    last_word = _drawn(unseen, longest, max(len(rounds[-1]), len(_TASKS) + 1), seed)
    planned = len(observed) + _HEAD_SAMPLES * config.n_layers * (1 + config.n_kv_heads // 2)  # half of them were loud
    counts = (_FIRST_PLANS, len(bounds) * _SURVIVORS[0] * (1 + len(SHARES)), len(bounds) * _SURVIVORS[1])
    planned += sum(len(one) * count for one, count in zip(rounds, counts, strict=True)) + len(bounds) * len(last_word)
    runner = _Runner(llm, journal, layer, planned, progress)

    # At which layers the score finds what is asked for; which heads need not look far back.
    score = scoring(config)
    findings = runner.observe(score, observed)
    tightest = min(one.kl for one in bounds.values())
    losses = head_losses(config, score, tightest, lambda plans: runner.kl(plans, quotations))

    def limited(plan: PrunePlan, allowed: float) -> PrunePlan:
        return with_windows(config, plan, quiet(losses, allowed))

    def cautious(plan: PrunePlan) -> PrunePlan:
        return limited(plan, SHARES[0] * tightest)

    plans = [
        cautious(dataclasses.replace(score, stages=())),
        *candidates(config, score, findings, length, cautious),
    ]
    plans = [plan for plan in plans if not plan.does_nothing]
    tried = {one.plan: one for one in runner.run(plans, rounds[0])}
    # Of what survives, other windows: how much they may lose depends on the preset.
    plans = _distinct(
        variant
        for one in bounds.values()
        for plan in _survivors([tried[plan] for plan in plans], one, _SURVIVORS[0])
        for variant in (plan, *(limited(plan, share * one.kl) for share in SHARES))
        if recomputed(config, variant, LONG) <= RECOMPUTED
    )
    seen = list(rounds[1])  # fresh text: what the first round has chosen by is too kind to the chosen
    tried |= {one.plan: one for one in runner.run(plans, seen)}
    # The last round begins around the cheapest plan that is within the bounds by now. Where it finds none that is, the
    # next dearer ones have their turn.
    seen, second = [*seen, *rounds[2]], [tried[plan] for plan in plans]
    finalists: dict[PrunePlan, Measured] = {}
    for one in bounds.values():
        for turn in _finalists(second, one, _SURVIVORS[1]):
            finalists |= {found.plan: found for found in runner.run(turn, seen)}
            if _cheapest_within(finalists.values(), one):
                break
    tried |= finalists
    presets = {
        name: _confirmed(finalists.values(), bounds[name], lambda plan: runner.run([plan], last_word)[0])
        for name in PRESETS
        if name in bounds
    }
    if (auto := presets.get("auto")) is not None:
        presets["auto"] = dataclasses.replace(auto, plan=dataclasses.replace(auto.plan, questions=_QUESTIONS))
    ttft = _time(llm, rounds[-1][0].prompt, presets)
    if progress:
        progress(planned, planned, "done")
    measured = tuple(sorted(tried.values(), key=lambda one: (one.samples, -one.work), reverse=True))
    used = {"name": Path(corpus.name).name, "sha256": corpus.sha256}
    lengths = length, longest
    model = fingerprint(llm.file, config, llm.engine.adapters)
    return Calibration(model, bounds, presets, measured, ttft, lengths, seed, used), journal


def _drawn(source: Source, length: int, samples: int, seed: int) -> list[Sample]:
    """The samples: recall, continuation and a question in turns, the questions' shapes in turns as well."""
    count = -(-samples // (len(_TASKS) + 1))
    rng = np.random.default_rng(seed)
    each = [task_samples(TASKS[task], source, length, count, seed) for task in _TASKS]
    each.append(_asking(source, length, count, seed))
    for one in each:
        rng.shuffle(one)  # a task draws along its text: neighbours resemble each other, and rounds take neighbours
    return [sample for turn in zip(*each, strict=True) for sample in turn][:samples]


def _asking(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` questions, their shapes in turns, those left out that take more tokens than ``length`` can spare."""
    fitting, short = [], None
    for name in _ASKING:
        try:
            task_samples(TASKS[name], source, length, 1, seed)
            fitting.append(name)
        except SettingError as error:
            short = error
    if short is not None and not fitting:
        raise short
    each = -(-count // len(fitting))
    shapes = [task_samples(TASKS[name], source, length, each, seed) for name in fitting]
    return [sample for turn in zip(*shapes, strict=True) for sample in turn][:count]


def _rounds(drawn: Sequence[Sample]) -> list[Sequence[Sample]]:
    """The samples cut by ``_ROUNDS``, whole turns to each but the last, so that every kind is in it."""
    shares, turn = np.cumsum(_ROUNDS[:-1]), len(_TASKS) + 1
    ends = [0, *(turn * max(at, round(share * len(drawn) / turn)) for at, share in enumerate(shares, 1)), len(drawn)]
    return [drawn[low:high] for low, high in itertools.pairwise(ends)]


def _loss(measured: Measured) -> float:
    """One figure to rank by, where no bound is near."""
    return measured.kl + max(0.0, measured.recall_drop) + max(0.0, measured.nll_rise) + max(0.0, measured.answer_loss)


def _survivors(measured: Iterable[Measured], bounds: Bounds, count: int) -> list[PrunePlan]:
    """``count`` plans that may be within ``bounds``: the cheapest, the one that loses least, and some between them."""
    front = _front(sorted(measured, key=lambda one: one.work), bounds)
    if not front:
        return []
    picked = np.unique(np.linspace(0, len(front) - 1, count).round().astype(int))
    return [front[at].plan for at in picked]


def _finalists(measured: Iterable[Measured], bounds: Bounds, count: int) -> list[list[PrunePlan]]:
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


def _distinct(plans: Iterable[PrunePlan]) -> list[PrunePlan]:
    """Each plan once, those with the same windows together: they share what is computed before their cuts."""
    return sorted(dict.fromkeys(plans), key=lambda plan: [(window.layer, window.reach) for window in plan.windows])


def _time(llm: LLM, prompt: Sequence[int], presets: dict[str, Measured | None]) -> dict[str, tuple[float, ...]]:
    plans = {"dense": PrunePlan()} | {name: found.plan for name, found in presets.items() if found}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(_TTFT_REPEATS):
        for name, plan in plans.items():
            seconds[name] += time_to_first_token(llm, prompt, plan).ttft_s
    return {name: tuple(round(one, 3) for one in found) for name, found in seconds.items()}


def _cheapest_within(measured: Iterable[Measured], bounds: Bounds) -> Measured | None:
    # Windows that reach over the whole of a short prompt lose nothing and gain nothing.
    within = [one for one in measured if one.is_within(bounds) and one.work < 1]
    return min(within, key=lambda one: one.work, default=None)


def _confirmed(measured: Iterable[Measured], bounds: Bounds, again: Callable[[PrunePlan], Measured]) -> Measured | None:
    """The cheapest plan within ``bounds`` that keeps them ``again``, on text that no choice was made by; as measured
    there."""
    within = [one for one in measured if one.is_within(bounds) and one.work < 1]
    for one in sorted(within, key=lambda one: one.work):
        if (found := again(one.plan)).excess(bounds) <= 0:
            return found
    return None


class _Runner:
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
    kl = [one["kl"] for sample, one in losses.items() if one and sample.task in _TASKS]
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
