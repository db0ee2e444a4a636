"""Run a prefill that is watched, and put what was seen into one report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimrt.context import Progress
from slimrt.explain.blocks import Block, prompt_blocks
from slimrt.explain.compare import ANSWER, Comparison, compare
from slimrt.explain.trace import CutTrace, PrefillTrace
from slimrt.llm import LLM
from slimrt.prune.plan import PrunePlan
from slimrt.prune.schedule import schedule
from slimrt.session import Session

__all__ = ["CutReport", "Explanation", "LayerReport", "Span", "explain"]

_DENSE_BLOCK = 64  # how finely a prompt is shown that no plan divides


@dataclass(frozen=True)
class CutReport:
    """A cut: at ``layer``'s attention ``tokens_after`` of ``tokens_before`` went on, and so with the blocks."""

    layer: int
    tokens_before: int
    tokens_after: int
    blocks_before: int
    blocks_after: int


@dataclass(frozen=True)
class LayerReport:
    """One layer: tokens in its attention, its share of the time, rows of keys and values that it left.

    ``near_heads``: of its KV heads those that looked back over a window only, in the first ``windowed_rows`` tokens.
    ``kv_resident``, ``kv_host``: their bytes where the model computes and in host memory; under a budget some rows lie
    in both.
    """

    layer: int
    tokens: int
    seconds: float
    kv_rows: int
    kv_resident: int
    kv_host: int
    near_heads: int = 0


@dataclass(frozen=True)
class Span:
    """Layers ``first`` to ``last``, all with the same tokens in their attention."""

    first: int
    last: int
    tokens: int
    blocks: int
    seconds: float
    kv_resident: int
    kv_host: int


@dataclass(frozen=True)
class Explanation:
    """One prefill of one prompt.

    ``plan`` None: dense by choice; ``why_dense``: why nothing was cut, empty if something was. ``ttft_s``: from token
    ids to the first logits; ``outside_s``: the part of it that is not spent in layers. ``states_host``: bytes of hidden
    states kept in host memory, from which another question can be answered. ``kv_kept``: bytes of all rows of keys and
    values, each counted once; ``kv_dense``: what a dense run of the prompt leaves. ``windowed_rows``: how many first
    tokens the windows of the plan hold for. ``doubts``: in words, why more was kept than usual, or later cut.
    ``compared``: what a dense run shows beside it, if one was asked for.
    """

    model: str
    file: str
    parameters: int
    ctx: int
    plan: PrunePlan | None
    plan_source: str
    why_dense: str
    question: str
    tokens: int
    block: int
    ttft_s: float
    outside_s: float
    states_host: int
    kv_heads: int
    windowed_rows: int
    kv_kept: int
    kv_dense: int
    cuts: tuple[CutReport, ...]
    layers: tuple[LayerReport, ...]
    blocks: tuple[Block, ...]
    doubts: tuple[str, ...] = ()
    compared: Comparison | None = None

    @property
    def kv_resident(self) -> int:
        """Bytes of keys and values where the model computes."""
        return sum(layer.kv_resident for layer in self.layers)

    @property
    def kv_host(self) -> int:
        """Bytes of keys and values in host memory."""
        return sum(layer.kv_host for layer in self.layers)

    def spans(self) -> tuple[Span, ...]:
        """The layers between cuts; a cut's layer has keys and values of all, so it counts to those before."""
        starts = [0, *(cut.layer + 1 for cut in self.cuts)]
        spans = []
        for first, end in zip(starts, [*starts[1:], len(self.layers)], strict=True):
            layers = self.layers[first:end]
            tokens = layers[0].tokens
            spans.append(
                Span(
                    first,
                    end - 1,
                    tokens,
                    -(-tokens // self.block),
                    sum(layer.seconds for layer in layers),
                    sum(layer.kv_resident for layer in layers),
                    sum(layer.kv_host for layer in layers),
                )
            )
        return tuple(spans)

    def fate(self, block: Block) -> str:
        """In words, how far a block came."""
        if block.survived < len(self.cuts):
            return f"dropped after layer {self.cuts[block.survived].layer}"
        return "kept to the end"

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        data = dataclasses.asdict(self)
        data["blocks"] = [{**block, "fate": self.fate(self.blocks[block["number"]])} for block in data["blocks"]]
        return {**data, "kv_resident": self.kv_resident, "kv_host": self.kv_host}


def explain(
    llm: LLM,
    ids: Sequence[int],
    *,
    question: str = "",
    progress: Progress | None = None,
    against_dense: bool = False,
) -> Explanation:
    """Read ``ids`` in a conversation of its own, with the plan that ``llm`` was loaded with, and tell what was kept.

    ``against_dense``: read them without cuts as well, and compare. Raises ContextError if ``ids`` is empty or exceeds
    the context (with the answer that is compared).
    """
    plan, trace, session = llm.plan.plan, PrefillTrace(), llm.session()
    if against_dense:
        session.check(ids, ANSWER)
    begun = time.perf_counter()
    reading = session.prefill(ids, plan, progress=progress, trace=trace)
    ttft = time.perf_counter() - begun
    block = _DENSE_BLOCK if plan is None else plan.block
    rule = schedule(plan, len(ids), None if plan is None else llm.asking(ids))
    sink, local = (rule.first_blocks, rule.last_blocks(len(ids))) if rule.cuts else (0, 0)
    cuts = tuple(_cut(cut, block) for cut in trace.cuts)
    boundary, layers = session.context.boundary, _layers(session, trace)
    states = 0 if boundary is None else boundary.nbytes
    token = llm.engine.kv_bytes_per_token
    # Last, for it reads on.
    compared = compare(llm, session, ids, trace.cuts, block, progress) if against_dense else None
    return Explanation(
        model=llm.config.name,
        file=llm.file.path.name,
        parameters=llm.config.n_params,
        ctx=llm.ctx,
        plan=plan,
        plan_source=llm.plan.source,
        why_dense=reading.dense if plan is not None else f"the prompt ran dense (plan {llm.plan.source})",
        question=question,
        tokens=len(ids),
        block=block,
        ttft_s=ttft,
        outside_s=ttft - sum(trace.seconds),
        states_host=states,
        kv_heads=llm.config.n_kv_heads,
        windowed_rows=reading.windowed,
        kv_kept=sum(layer.kv_rows for layer in layers) * token // len(layers),
        kv_dense=len(ids) * token,
        cuts=cuts,
        layers=layers,
        blocks=prompt_blocks(llm.tokenizer, ids, block, trace.cuts, sink=sink, local=local, follow=rule.plan.follow),
        doubts=reading.doubts,
        compared=compared,
    )


def _cut(cut: CutTrace, block: int) -> CutReport:
    before, after = len(cut.positions), len(cut.kept)
    return CutReport(cut.layer, before, after, -(-before // block), -(-after // block))


def _layers(session: Session, trace: PrefillTrace) -> tuple[LayerReport, ...]:
    """What each layer cost and left; a cut leaves its own layer's keys and values whole."""
    cache = session.context.cache
    layers, tokens = [], len(session.tokens)
    after = {cut.layer: len(cut.kept) for cut in trace.cuts}
    for number, seconds in enumerate(trace.seconds):
        near = sum(rows > 0 for rows in session.context.windows.reach.get(number, ()))
        layers.append(LayerReport(number, tokens, seconds, cache.length(number), *cache.layer_nbytes(number), near))
        tokens = after.get(number, tokens)
    return tuple(layers)
