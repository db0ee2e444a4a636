"""What the rows of a layer see: windows, some rows at a time, and which blocks a cut's queries want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimrt.context import Context
from slimrt.models import Llama
from slimrt.ops.protocol import Array, Ops
from slimrt.parts import Parts
from slimrt.prune.asked import wanted
from slimrt.prune.reach import Reach
from slimrt.prune.schedule import Schedule, Windows
from slimrt.prune.select import rivals
from slimrt.row_blocks import Queries

__all__ = ["Attention"]


class Attention:
    """The attention of one model's layers on one backend. ``parts``: between which others have their turn."""

    def __init__(self, model: Llama, ops: Ops, parts: Parts) -> None:
        self._model, self._ops, self.parts = model, ops, parts

    def attend(
        self,
        windows: Windows,
        layer: int,
        q: Array,
        positions: np.ndarray,
        keys: Array,
        values: Array,
        held: np.ndarray,
        places: np.ndarray | None = None,
    ) -> Array:
        """Attention of the last rows of a layer, or of those at ``places`` [T] among the keys, the rows under a plan's
        windows apart from those that see everything; in a layer with a window of its own each row sees the keys at the
        last positions up to its own.

        Windows go by a row's position, not by its place: decode under a budget is given some of the keys only.
        """
        how: dict[str, Any] = {} if places is None else {"places": places}
        if window := self._model.config.window(layer):
            how["first"] = np.searchsorted(held, positions[len(positions) - len(q) :] - window + 1)
        how |= self.softmax(layer)
        if layer in self._model.large_keys:
            how["precise"] = True
        limited = 0  # of the rows in q
        if layer in windows.reach:
            limited = int(np.searchsorted(positions[len(positions) - len(q) :], windows.rows))
        if limited == 0:
            return self._in_parts(q, keys, values, how)
        result = self._ops.empty(q.shape)  # under windows all rows of the layer are there
        near, far = slice(0, limited), slice(limited, len(q))
        self._in_parts(*_seen(near, q, keys, values, how), out=result[near], reach=windows.reach[layer])
        if limited < len(q):
            self._in_parts(*_seen(far, q, keys, values, how), out=result[far])
        return result

    def softmax(self, layer: int) -> dict[str, Any]:
        """What a layer's softmax has besides the scores, where the model has that: a soft cap, sinks."""
        c = self._model.config
        how: dict[str, Any] = {"cap": c.attention_cap} if c.attention_cap else {}
        return how | ({"sinks": self._model.sinks[layer]} if c.sinks else {})

    def _in_parts(
        self,
        q: Array,
        keys: Array,
        values: Array,
        how: Mapping[str, Any],
        out: Array | None = None,
        reach: Reach = None,
    ) -> Array:
        """``ops.attend``, some rows at a time where others wait for their turn between them."""
        result = out
        for some in self.parts.slices("attention", len(q)):
            if some.stop - some.start == len(q):
                return self._ops.attend(q, keys, values, out, reach=reach, **how)
            result = self._ops.empty(q.shape) if result is None else result
            rows, seen, seen_values, own = _seen(some, q, keys, values, how)
            self._ops.attend(rows, seen, seen_values, result[some], reach=reach, **own)
        return result

    def scores(
        self, context: Context, rule: Schedule, layer: int, q: Queries, keys: Array, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """How much each block of the active rows is wanted [B], and by the token of which position [B] (-1: none); the
        published scores do not tell (None).

        ``q``: of the rows of this pass, which may be the last of the layer's.
        """
        ops, plan, asked = self._ops, rule.plan, rule.asked
        if asked is None:
            return ops.score_blocks(plan.score, q.last[-plan.query_window :], keys, plan.block, plan.unit), None
        rows = keys.shape[1]
        tail, how = len(asked.tail), self.softmax(layer)
        groups: list[tuple[np.ndarray, Sequence[float]]] = [
            (ops.block_mass(q.last[len(q.last) - tail :], keys, plan.block, True, **how), asked.tail)
        ]
        places = [positions[rows - tail :]]
        if any(asked.head):
            first = positions[: np.searchsorted(positions, len(asked.head))]
            if q.rows == rows:
                own = q.first[: len(first)]
            else:
                assert context.boundary is not None and layer == context.boundary.layer
                own = context.boundary.first_queries()[: len(first)]
            moved = self._model.moved(own, positions[-1] + 1 - first, layer)
            groups.append((ops.block_mass(moved, keys, plan.block, False, **how), [asked.head[at] for at in first]))
            places.append(first)
        scores, by = wanted(groups, rivals(rule, len(groups[0][0][0, 0]), rows))
        return scores, np.where(by < 0, -1, np.concatenate(places)[by])


def _seen(
    some: slice, q: Array, keys: Array, values: Array, how: Mapping[str, Any]
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Of the rows of ``q`` those in ``some``, with keys and values up to the last one's own, and ``how`` they look."""
    places = how.get("places")
    stop = keys.shape[1] - len(q) + some.stop if places is None else int(places[some.stop - 1]) + 1
    own = {name: value[some] if name in ("places", "first") else value for name, value in how.items()}
    return q[some], keys[:, :stop], values[:, :stop], own
