"""What a task hands to the evaluation: a prompt of token ids and what should follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slimrt.eval.text import Corpus
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Kind", "Sample", "Source", "Task"]

Kind = Literal["generation", "continuation"]


@dataclass(frozen=True)
class Sample:
    """One prompt.

    "generation": up to ``max_tokens`` tokens are drawn greedily, the answer should contain every one of ``references``.
    "continuation": the tokens ``continuation`` are read after the prompt, and the logits that predict them are judged.
    ``evidence``: the rows of the prompt that hold what the continuation is taken from; none where nothing does.
    ``forced``: tokens read between the prompt and the continuation, as if the model had written them, and not judged.
    ``cluster``: samples of a task with the same number share text; None: this one shares none.
    """

    task: str
    index: int
    kind: Kind
    prompt: tuple[int, ...]
    references: tuple[str, ...] = ()
    continuation: tuple[int, ...] = ()
    max_tokens: int = 0
    evidence: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    cluster: int | None = None


@dataclass(frozen=True)
class Source:
    """What tasks draw from: the model's tokenizer, running text (``corpus``) for those that need it, and how messages
    become a prompt (``chat``; None where the model has no chat template)."""

    tokenizer: Tokenizer
    corpus: Corpus
    chat: Callable[[Sequence[Mapping[str, Any]]], list[int]] | None = None


@dataclass(frozen=True)
class Task:
    """A family of prompts.

    ``make(source, length, count, rng)`` yields ``count`` samples whose prompts have exactly ``length`` tokens. Every
    random choice comes from ``rng``. It raises SettingError where ``length`` is too short for the task, or the text too
    short for the samples. ``extra`` is the most tokens that follow a prompt.
    """

    name: str
    summary: str
    kind: Kind
    extra: int
    make: Callable[[Source, int, int, np.random.Generator], Iterator[Sample]]
