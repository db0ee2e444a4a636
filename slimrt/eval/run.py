"""The paired evaluation: every plan answers the prompts that the dense run answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimrt import __version__
from slimrt.errors import ComputeError, ContextError, SettingError
from slimrt.eval.metrics import accuracy, kl, nll, substring_score
from slimrt.eval.report import DENSE, EvalReport, Result, Timing
from slimrt.eval.ruler import RULER
from slimrt.eval.sample import Sample, Source
from slimrt.eval.tasks import resolve
from slimrt.eval.tasks import samples as task_samples
from slimrt.eval.text import Corpus, load_corpus
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import choose_plan

if TYPE_CHECKING:
    from slimrt.llm import LLM

__all__ = ["Response", "context_needed", "evaluate", "judge", "respond", "time_to_first_token"]

Plan = PrunePlan | str | Path
Progress = Callable[[int, int, str], None]

_Run = tuple["LLM", Plan]

TTFT_REPEATS = 3


@dataclass(frozen=True, eq=False)
class Response:
    """What the model made of a sample: the drawn ``answer``, or the ``logits`` [T, V] that predict its continuation."""

    answer: str | None = None
    logits: np.ndarray | None = None


def respond(llm: LLM, sample: Sample, plan: Plan) -> Response:
    """Run one sample under one plan, from an empty context."""
    if sample.kind == "generation":
        completion = llm.generate(
            list(sample.prompt), prune=plan, session=llm.session(), temperature=0.0, max_tokens=sample.max_tokens
        )
        return Response(answer=completion.text)
    ids = [*sample.prompt, *sample.forced, *sample.continuation]
    logits = llm.continuation_logits(ids, len(sample.prompt), prune=plan, decode=True)
    return Response(logits=logits[len(sample.forced) :])


def judge(sample: Sample, dense: Response, response: Response) -> dict[str, float]:
    """The metrics of a response; ``dense`` is the dense run's to the same sample.

    "score" for generation; for continuation the means of "accuracy" (top-1), "nll" (nats a token) and "kl" (dense to
    this one, nats a token); behind a forced opening "nats" (of the whole answer) in place of "nll". Raises ComputeError
    where one is not finite.
    """
    if response.answer is not None:
        return {"score": substring_score(response.answer, sample.references)}
    assert response.logits is not None and dense.logits is not None
    loss = nll(response.logits, sample.continuation)
    metrics = {
        "accuracy": float(accuracy(response.logits, sample.continuation).mean()),
        # Of an answer all its tokens together: whoever loses its first one has lost it.
        **({"nats": float(loss.sum())} if sample.forced else {"nll": float(loss.mean())}),
        "kl": float(kl(dense.logits, response.logits).mean()),
    }
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ComputeError(
                f"task {sample.task}, sample {sample.index}: {name} is {value}, must be finite; check the model file"
            )
    return metrics


def time_to_first_token(llm: LLM, prompt: Sequence[int], plan: Plan) -> Timing:
    """One timed prefill of ``prompt`` from an empty context, up to the first token. The plan's name is left empty."""
    timings = llm.generate(list(prompt), prune=plan, session=llm.session(), temperature=0.0, max_tokens=1).timings
    kv_bytes = timings.kv_bytes_device + timings.kv_bytes_host
    return Timing(len(prompt), "", (timings.ttft_s,), timings.stages, kv_bytes)


def context_needed(tasks: Sequence[str], lengths: Sequence[int]) -> int:
    """The context that a model must be loaded with to evaluate ``tasks`` at ``lengths``. Raises SettingError."""
    return max(_checked_lengths(lengths)) + max(task.extra for task in resolve(tasks))


def evaluate(
    llm: LLM,
    plans: Mapping[str, Plan],
    tasks: Sequence[str] = ("all",),
    lengths: Sequence[int] = (2000,),
    samples: int = 8,
    seed: int = 0,
    text: str | Path | Corpus | None = None,
    progress: Progress | None = None,
    *,
    ttft_repeats: int = TTFT_REPEATS,
    budgeted: Mapping[str, LLM] | None = None,
) -> EvalReport:
    """Compare ``plans`` (name -> plan) with the dense run, on identical prompts.

    ``tasks``: names or groups as ``slimrt.eval.tasks.resolve`` takes them. ``lengths``: prompt lengths in tokens, met
    exactly. ``samples``: prompts per task and length; the same ``seed`` gives the same ones. ``text``: a UTF-8 file or
    a corpus for the tasks on running text (default: Python's own documentation). ``progress`` is called with (steps
    done, steps, what comes next). Time to first token is measured after the tasks, when every plan has run,
    ``ttft_repeats`` times a plan in turns, so that a change of the machine's speed meets all plans alike; 0: never.
    ``budgeted``: name -> the same model loaded with ``kv_budget``; each answers without pruning, so that the difference
    is what decode loses that reads so many rows a layer.

    Raises SettingError for settings out of range, plans that do not fit the model and a text that is unusable or too
    short, ContextError if a prompt and its answer exceed the context: all before the first prompt is run.
    """
    chosen = resolve(tasks)
    budgeted = budgeted or {}
    choices = _checked_plans(llm, plans, budgeted)
    for name, count, least in (("samples", samples, 1), ("ttft_repeats", ttft_repeats, 0)):
        if count < least:
            raise SettingError(f"{name} {count}: must be at least {least}")
    if seed < 0:
        raise SettingError(f"seed {seed}: must be at least 0")
    needed = context_needed(tasks, lengths)
    if needed > llm.ctx:
        raise ContextError(
            f"prompts of {max(lengths)} tokens and their answers take {needed}, the context holds {llm.ctx}; "
            f"load the model with ctx={needed} or more (--ctx), or take shorter prompts"
        )
    corpus = text if isinstance(text, Corpus) else load_corpus(llm.tokenizer, text)
    source = Source(llm.tokenizer, corpus, llm.chat_tokens if llm.has_chat_template else None)
    # All samples before any is run, so that settings that cannot work fail at once.
    sizes = sorted(set(lengths))
    drawn = {size: [s for task in chosen for s in task_samples(task, source, size, samples, seed)] for size in sizes}
    everyone: dict[str, _Run] = {DENSE: (llm, "off"), **{name: (llm, plan) for name, plan in plans.items()}}
    everyone |= {name: (other, "off") for name, other in budgeted.items()}
    runs = sum(map(len, drawn.values())) + len(sizes) * ttft_repeats
    steps = _Steps(progress, runs * len(everyone))
    results = [result for size in sizes for sample in drawn[size] for result in _run_sample(sample, everyone, steps)]
    timings = [
        timing
        for size in sizes
        for timing in _time([sample.prompt for sample in drawn[size]], everyone, ttft_repeats, steps)
    ]
    steps.next("done")
    return EvalReport(
        model=llm.config.name,
        version=__version__,
        text={"name": source.corpus.name, "sha256": source.corpus.sha256},
        seed=seed,
        samples=samples,
        plans=choices,
        ruler_tasks=tuple(task.name for task in RULER),
        results=tuple(results),
        timings=tuple(timings),
    )


class _Steps:
    """Counts the work done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, what)
        self._done += 1


def _checked_plans(llm: LLM, plans: Mapping[str, Plan], budgeted: Mapping[str, LLM]) -> dict[str, dict[str, object]]:
    """What each plan or budget is, for the report. Raises SettingError for one that the model cannot run."""
    if not plans and not budgeted:
        raise SettingError("plans: none was given; at least one is compared with the dense run")
    found: dict[str, dict[str, object]] = {DENSE: {"plan": None, "source": "dense"}}
    for name, other in budgeted.items():
        if name in plans or name == DENSE:
            raise SettingError(f"budget named '{name}': a plan has that name; take another")
        if other.ctx < llm.ctx:
            raise SettingError(
                f"'{name}' was loaded with ctx={other.ctx}, the model that it is held against with {llm.ctx}"
            )
        found[name] = {"plan": None, "source": f"dense, decode under a budget of keys and values ({name})"}
    for name, plan in plans.items():
        if name == DENSE or not name:
            raise SettingError(
                f"plan name '{name}': stands for the dense run, which is always there; take another name"
            )
        choice = choose_plan(plan, llm.file, llm.config, llm.engine.adapters)
        found[name] = {
            "plan": None if choice.plan is None else dataclasses.asdict(choice.plan),
            "source": choice.source,
        }
    return found


def _checked_lengths(lengths: Sequence[int]) -> Sequence[int]:
    if not lengths:
        raise SettingError("lengths: none was given; at least one prompt length in tokens is needed")
    for length in lengths:
        if length < 1:
            raise SettingError(f"length {length}: a prompt has at least 1 token")
    return lengths


def _run_sample(sample: Sample, runs: Mapping[str, _Run], steps: _Steps) -> Iterator[Result]:
    """One sample under every plan; the dense run comes first, for the others are judged against it."""
    dense: Response | None = None
    for name, (llm, plan) in runs.items():
        steps.next(f"{sample.task} {len(sample.prompt)} #{sample.index + 1} {name}")
        response = respond(llm, sample, plan)
        dense = dense or response
        metrics = judge(sample, dense, response)
        yield Result(
            len(sample.prompt), sample.task, sample.index, name, metrics, response.answer, sample.references,
            sample.index if sample.cluster is None else sample.cluster,
        )  # fmt: skip


def _time(prompts: Sequence[Sequence[int]], runs: Mapping[str, _Run], repeats: int, steps: _Steps) -> Iterator[Timing]:
    """Time to first token of every plan, in turns, over prompts of one length."""
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for repeat in range(repeats):
        prompt = prompts[repeat % len(prompts)]
        for name, (llm, plan) in runs.items():
            steps.next(f"time to first token {len(prompt)} {name}")
            found[name].append(time_to_first_token(llm, prompt, plan))
    for name, timings in found.items() if repeats else ():
        seconds = tuple(timing.ttft_s[0] for timing in timings)
        yield dataclasses.replace(timings[-1], plan=name, ttft_s=seconds)
