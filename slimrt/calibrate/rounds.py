"""The prompts that plans are measured on: text and questions in turns, cut into rounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from slimrt.errors import SettingError
from slimrt.eval.sample import Sample, Source
from slimrt.eval.tasks import TASKS
from slimrt.eval.tasks import samples as samples_of

__all__ = ["ALL_TASKS", "TEXT_TASKS", "cut_in_rounds", "drawn_samples"]

TEXT_TASKS = ("recall", "continuation")
# Questions as people put them: behind a document and before it, with instructions, a schema or examples behind them.
_ASKING = (
    "ask_brief", "ask_first", "ask_schema", "ask_several", "ask_rules", "ask_system", "quote", "ask_examples",
    "ask_first_reminder", "ask_form", "ask_about", "ask_raw",
)  # fmt: skip
ALL_TASKS = (*TEXT_TASKS, *_ASKING)
_ROUNDS = (0.2, 0.3, 0.5)  # of the samples; each round measures the plans that the one before left


def drawn_samples(source: Source, length: int, samples: int, seed: int) -> list[Sample]:
    """The samples: recall, continuation and a question in turns, the questions' shapes in turns as well."""
    count = -(-samples // (len(TEXT_TASKS) + 1))
    rng = np.random.default_rng(seed)
    each = [samples_of(TASKS[task], source, length, count, seed) for task in TEXT_TASKS]
    each.append(_questions(source, length, count, seed))
    for one in each:
        rng.shuffle(one)  # a task draws along its text: neighbours resemble each other, and rounds take neighbours
    return [sample for turn in zip(*each, strict=True) for sample in turn][:samples]


def _questions(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` questions, their shapes in turns, those left out that take more tokens than ``length`` can spare."""
    fitting, short = [], None
    for name in _ASKING:
        try:
            samples_of(TASKS[name], source, length, 1, seed)
            fitting.append(name)
        except SettingError as error:
            short = error
    if short is not None and not fitting:
        raise short
    each = -(-count // len(fitting))
    shapes = [samples_of(TASKS[name], source, length, each, seed) for name in fitting]
    return [sample for turn in zip(*shapes, strict=True) for sample in turn][:count]


def cut_in_rounds(drawn: Sequence[Sample]) -> list[Sequence[Sample]]:
    """The samples cut by ``_ROUNDS``, whole turns to each but the last, so that every kind is in it."""
    shares, turn = np.cumsum(_ROUNDS[:-1]), len(TEXT_TASKS) + 1
    ends = [0, *(turn * max(at, round(share * len(drawn) / turn)) for at, share in enumerate(shares, 1)), len(drawn)]
    return [drawn[low:high] for low, high in itertools.pairwise(ends)]
