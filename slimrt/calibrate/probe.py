"""One prompt under the dense run and under many plans, the layers before the first cut computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from slimrt.engine import Engine
from slimrt.eval.run import Response, judge
from slimrt.eval.sample import Sample
from slimrt.prune.asked import Asked
from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import Windows, schedule

__all__ = ["Probe", "probing"]


class Probe:
    """The dense run of one continuation sample, and what plans make of it.

    What lies before the earliest cut is the same under all plans with the same windows there (hidden states of
    ``boundary_layer``, keys and values of the layers up to it), so such plans, one after the other, cost their own
    layers only.
    """

    def __init__(self, engine: Engine, sample: Sample, boundary_layer: int, asked: Asked | None = None) -> None:
        """``asked``: which tokens of the sample's prompt ask, for plans of that score."""
        self._engine, self._sample, self._asked = engine, sample, asked
        self._context = engine.new_context(boundary_layer)
        hidden, _ = engine.prefill(self._context, sample.prompt)
        self._dense = self._read_on(hidden)

    def measure(self, plan: PrunePlan) -> Mapping[str, float]:
        """The losses of ``plan`` on this sample, all positive where it is worse than the dense run.

        "kl" (nats a token), "accuracy" (top-1, a share), and "nll" (nats a token) or, of an answer behind a forced
        opening, "nats" (all of it). Raises ComputeError if not finite.
        """
        prompt = self._sample.prompt
        rule = schedule(plan, len(prompt), self._asked)
        # Without a cut the layers behind the boundary are read on from, so nothing of another plan's may be in them.
        shared = rule.cuts and self._early(rule.windows) == self._early(self._context.windows)
        self._context.truncate(len(prompt) - rule.fresh_rows if shared else 0)
        rest = prompt[self._context.length :]
        hidden, _ = self._engine.prefill(self._context, rest, rule)
        found = judge(self._sample, self._dense, self._read_on(hidden))
        dense = judge(self._sample, self._dense, self._dense)
        loss = "nats" if self._sample.forced else "nll"
        return {
            "kl": found["kl"],
            "accuracy": dense["accuracy"] - found["accuracy"],
            loss: found[loss] - dense[loss],
        }

    def _early(self, limits: Windows) -> Windows:
        """Of the windows those that what is shared depends on."""
        assert self._context.boundary is not None
        reach = {layer: rows for layer, rows in limits.reach.items() if layer <= self._context.boundary.layer}
        return Windows(reach, limits.rows if reach else 0)

    def _read_on(self, hidden: np.ndarray) -> Response:
        """The logits that predict the continuation, after a prompt that left ``hidden`` [1, D]."""
        following = (*self._sample.forced, *self._sample.continuation)[:-1]
        rows = [hidden]
        if following:
            rows.append(self._engine.extend(self._context, following, wanted=len(following)))
        return Response(logits=self._engine.logits(np.concatenate(rows))[len(self._sample.forced) :])

    def close(self) -> None:
        """Let go of the memory."""
        self._context.cache.close()


@contextmanager
def probing(engine: Engine, sample: Sample, boundary_layer: int, asked: Asked | None = None) -> Iterator[Probe]:
    """A probe that is closed at the end."""
    probe = Probe(engine, sample, boundary_layer, asked)
    try:
        yield probe
    finally:
        probe.close()
