"""The search: what the score finds at each layer, which heads need not look far, then plans, in rounds of fewer plans
and more text; the last word has text that no choice was made by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimrt import __version__
from slimrt.calibrate.candidates import (
    LONG,
    MIN_TOKENS,
    RECOMPUTED,
    candidates,
    first_layer,
    recomputed,
    scoring,
)
from slimrt.calibrate.heads import SHARES, head_losses, quiet, with_windows
from slimrt.calibrate.journal import Journal
from slimrt.calibrate.losses import Bounds, Measured, cheapest_within, confirmed, finalists, survivors
from slimrt.calibrate.rounds import ALL_TASKS, TEXT_TASKS, cut_in_rounds, drawn_samples
from slimrt.calibrate.runner import Progress, Runner
from slimrt.errors import ContextError, SettingError
from slimrt.eval.run import context_needed, time_to_first_token
from slimrt.eval.sample import Source
from slimrt.eval.text import Corpus, load_corpus
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import PRESETS, fingerprint

if TYPE_CHECKING:
    from slimrt.llm import LLM

__all__ = ["Calibration", "calibrate", "calibration_context"]

_OBSERVED = 24  # prompts on which layers are compared
_QUESTIONS = 2  # prompts on one document that `auto` cuts; a third one is better off with all of it (PrunePlan)
_FIRST_PLANS = 35  # about as many as the first round has
_LONGER = 2  # times as long are the prompts of the last round, where the context allows: windows cost the more there
_SURVIVORS = (4, 4)  # plans a preset that a round leaves
_HEAD_SAMPLES = 2  # on which layers and heads are limited alone: quotations, for which heads look back the farthest
_TTFT_REPEATS = 3


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
    return max(context_needed(ALL_TASKS, [length]), min(context_needed(ALL_TASKS, [_LONGER * length]), trained))


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
    prompts as the last round has. Measurements go to a file beside ``journal_path``, one for each choice of settings,
    as they are made, and are read from there if they were made before; ``begun`` is called with that journal, and the
    caller removes it when the result is stored.
    ``progress`` is called with (measurements done, measurements planned, what comes next).

    Raises SettingError for settings out of range, ContextError where prompts exceed the context: before any work.
    """
    needed = context_needed(ALL_TASKS, [length])
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
    drawn = drawn_samples(source, length, samples, seed)
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
    rounds = cut_in_rounds(drawn)
    observed = [sample for sample in drawn if sample.evidence][:_OBSERVED]
    quotations = [sample for sample in drawn if sample.task == "recall"][:_HEAD_SAMPLES]
    if longest > length:
        rounds[-1] = drawn_samples(source, longest, len(rounds[-1]), seed)
    last_word = drawn_samples(unseen, longest, max(len(rounds[-1]), len(TEXT_TASKS) + 1), seed)
    planned = len(observed) + _HEAD_SAMPLES * config.n_layers * (1 + config.n_kv_heads // 2)  # half of them were loud
    counts = (_FIRST_PLANS, len(bounds) * _SURVIVORS[0] * (1 + len(SHARES)), len(bounds) * _SURVIVORS[1])
    planned += sum(len(one) * count for one, count in zip(rounds, counts, strict=True)) + len(bounds) * len(last_word)
    runner = Runner(llm, journal, layer, planned, progress)

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
        for plan in survivors([tried[plan] for plan in plans], one, _SURVIVORS[0])
        for variant in (plan, *(limited(plan, share * one.kl) for share in SHARES))
        if recomputed(config, variant, LONG) <= RECOMPUTED
    )
    seen = list(rounds[1])  # fresh text: what the first round has chosen by is too kind to the chosen
    tried |= {one.plan: one for one in runner.run(plans, seen)}
    # The last round begins around the cheapest plan that is within the bounds by now. Where it finds none that is, the
    # next dearer ones have their turn.
    seen, second = [*seen, *rounds[2]], [tried[plan] for plan in plans]
    final: dict[PrunePlan, Measured] = {}
    for one in bounds.values():
        for turn in finalists(second, one, _SURVIVORS[1]):
            final |= {found.plan: found for found in runner.run(turn, seen)}
            if cheapest_within(final.values(), one):
                break
    tried |= final
    presets = {
        name: confirmed(final.values(), bounds[name], lambda plan: runner.run([plan], last_word)[0])
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
