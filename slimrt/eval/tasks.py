"""All tasks by name: verbatim recall and continuation on running text, and RULER's."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from slimrt.errors import SettingError
from slimrt.eval.ruler import RULER
from slimrt.eval.sample import Sample, Source, Task
from slimrt.eval.shapes import SHAPES
from slimrt.eval.text import windows

__all__ = ["CONTINUATION_TOKENS", "RECALL_TOKENS", "TASKS", "resolve", "samples"]

RECALL_TOKENS = 24
CONTINUATION_TOKENS = 64


def _begin(source: Source) -> tuple[int, ...]:
    """The begin token, where the model wants one."""
    tokenizer = source.tokenizer
    return (tokenizer.bos_id,) if tokenizer.add_bos and tokenizer.bos_id is not None else ()


def _recall(source: Source, length: int, count: int, rng: np.random.Generator) -> Iterator[Sample]:
    """A text, then ``RECALL_TOKENS`` tokens from a random place in it; the text goes on after that place."""
    begin = _begin(source)
    size = length - len(begin) - RECALL_TOKENS
    if size < 2 * RECALL_TOKENS:
        raise SettingError(
            f"task recall: a prompt of {length} tokens; its shortest has {len(begin) + 3 * RECALL_TOKENS}, ask for more"
        )
    for index, (window, cluster) in enumerate(windows(source.corpus, size, 2 * RECALL_TOKENS, count, rng)):
        place = rng.integers(0, size - 2 * RECALL_TOKENS + 1)
        cue, answer = np.split(window[place : place + 2 * RECALL_TOKENS], 2)
        prompt = (*begin, *window.tolist(), *cue.tolist())
        quoted = len(begin) + int(place) + RECALL_TOKENS
        rows = tuple(range(quoted, quoted + RECALL_TOKENS))
        yield Sample(
            "recall", index, "continuation", prompt, continuation=tuple(answer.tolist()), evidence=rows, cluster=cluster
        )


def _continuation(source: Source, length: int, count: int, rng: np.random.Generator) -> Iterator[Sample]:
    """A text and how it goes on."""
    begin = _begin(source)
    size = length - len(begin)
    if size < 1:
        raise SettingError(f"task continuation: a prompt of {length} tokens; ask for at least {len(begin) + 1}")
    drawn = windows(source.corpus, size + CONTINUATION_TOKENS, CONTINUATION_TOKENS, count, rng)
    for index, (window, cluster) in enumerate(drawn):
        prompt, rest = (*begin, *window[:size].tolist()), tuple(window[size:].tolist())
        yield Sample("continuation", index, "continuation", prompt, continuation=rest, cluster=cluster)


_TEXT = (
    Task("recall", "24 tokens quoted from the text, the next 24 predicted", "continuation", RECALL_TOKENS, _recall),
    Task("continuation", "the next 64 tokens of the text", "continuation", CONTINUATION_TOKENS, _continuation),
)

TASKS: dict[str, Task] = {task.name: task for task in (*_TEXT, *SHAPES, *RULER)}
_GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(TASKS),
    "text": tuple(task.name for task in _TEXT),
    "shapes": tuple(task.name for task in SHAPES),
    "ruler": tuple(task.name for task in RULER),
}


def resolve(names: Sequence[str]) -> tuple[Task, ...]:
    """Tasks and groups ("all", "text", "shapes", "ruler") by name, each once, in the order of ``TASKS``.

    Raises SettingError for a name that is neither, and if there is none.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in TASKS and name not in _GROUPS:
            raise SettingError(f"task '{name}': known are {', '.join([*TASKS, *_GROUPS])}")
        wanted.update(_GROUPS.get(name, (name,)))
    if not wanted:
        raise SettingError(f"tasks: none was named; known are {', '.join([*TASKS, *_GROUPS])}")
    return tuple(task for task in TASKS.values() if task.name in wanted)


def samples(task: Task, source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The samples of a task for one prompt length; the same for the same arguments, whatever else is evaluated.

    Raises SettingError as ``Task.make`` does.
    """
    rng = np.random.default_rng([seed, length, zlib.crc32(task.name.encode())])
    return list(task.make(source, length, count, rng))
