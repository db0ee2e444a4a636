"""Texts as vectors: hidden states behind the output norm, pooled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from slimrt.context import Progress
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.models import Llama
from slimrt.ops.protocol import Array
from slimrt.prune.schedule import DENSE

__all__ = ["Pooling", "check_pooling", "embedded", "read_apart", "states_of"]

Pooling = Literal["mean", "last", "cls"]
_ROWS = 1024  # of several texts that pass together, at most


def check_pooling(pooling: object) -> None:
    """Raise SettingError unless ``pooling`` is one of the three."""
    if pooling not in get_args(Pooling):
        raise SettingError(f"pooling {pooling!r}: must be 'mean', 'last' or 'cls' (the first token)")


def embedded(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    pooling: Pooling,
    *,
    normalize: bool,
    progress: Progress | None = None,
) -> np.ndarray:
    """Token ids -> one vector each [n, D] float32; see ``LLM.embed``. ``progress`` gets texts done, texts in all."""
    vectors, done = np.empty((len(prompts), engine.config.d_model), np.float32), 0
    context = engine.new_context()
    try:
        # The last row alone passes experts as in decode.
        alone = not engine.ops.each_alone or engine.adapters or (pooling == "last" and engine.config.experts)
        for group in ([number] for number in range(len(prompts))) if alone else _groups(engine, prompts):
            if len(group) == 1:
                ids = prompts[group[0]]
                states = [engine.prefill(context, ids, wanted=1 if pooling == "last" else len(ids))[0]]
                context.truncate(0)
            else:
                states = read_apart(engine, [prompts[number] for number in group], last=pooling == "last")
            for number, rows in zip(group, states, strict=True):
                rows = rows[:1] if pooling == "cls" else rows
                vectors[number] = engine.last_states(rows).mean(axis=0, dtype=np.float64)
            done += len(group)
            if progress:
                progress(done, len(prompts))
    finally:
        context.cache.close()
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


def _groups(engine: Engine, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of all prompts, short ones together."""
    few, together, rows = engine.ops.unpack_rows, list[int](), 0
    for number, ids in enumerate(prompts):
        if not few <= len(ids) <= _ROWS // 2:  # fewer rows pass as in decode
            yield [number]
            continue
        if rows + len(ids) > _ROWS:
            yield together
            together, rows = [], 0
        together.append(number)
        rows += len(ids)
    if together:
        yield together


def read_apart(engine: Engine, texts: Sequence[Sequence[int]], *, last: bool) -> list[Array]:
    """Read ``texts`` in one pass through the layers, each as from an empty context: the hidden states [T, D] of its
    tokens, or (``last``) [1, D] of its last one, behind the last layer.

    The row-wise parts of a layer run for all texts at once, so that its weights are unpacked once; attention runs for
    each text alone.
    """
    model, ops = engine.model, engine.ops
    with ops.computing():
        ends = np.cumsum([len(ids) for ids in texts])
        parts = [slice(end - len(ids), end) for end, ids in zip(ends.tolist(), texts, strict=True)]
        positions = np.concatenate([np.arange(len(ids)) for ids in texts])
        x, turns = model.embed(np.concatenate([np.asarray(ids) for ids in texts])), model.rope(positions)
        for number, packed in enumerate(model.layers):
            layer = model.unpacked(packed)
            q, k, v = model.qkv(layer, x, turns)
            q = model.grown(q, positions)
            first = -1 if last and number == len(model.layers) - 1 else 0
            keys, values = (np.ascontiguousarray(one.transpose(1, 0, 2)) for one in (k, v))
            attention = [
                engine.attention.attend(
                    DENSE.windows, number, q[part][first:], positions[part], keys[:, part], values[:, part],
                    positions[part],
                )
                for part in parts
            ]  # fmt: skip
            if first:
                x, parts = ops.take(x, ends - 1), [slice(at, at + 1) for at in range(len(parts))]
            x = model.project(layer, x, np.concatenate(attention))
            work = functools.partial(_fed_forward, model, layer, x)
            x = engine.parts.each("feed forward", work, len(x))
            del layer  # a scratch copy of its weights goes before the next layer's is made
        return [x[part] for part in parts]


def _fed_forward(model: Llama, layer: Any, x: Array, some: slice) -> Array:
    return model.feed_forward(layer, x[some])


def states_of(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """The hidden states behind the output norm of each of ``ids``, from an empty context -> float32 [T, D]."""
    context = engine.new_context()
    try:
        return engine.last_states(engine.prefill(context, ids, wanted=len(ids))[0])
    finally:
        context.cache.close()
