"""What a plan does to a prompt of known length, in one value: the cuts, the windows, and why it runs dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from slimrt.prune.plan import PrunePlan
from slimrt.prune.reach import RUN

__all__ = ["DENSE", "Cut", "Schedule", "Windows", "local_blocks", "schedule"]


@dataclass(frozen=True)
class Cut:
    """A stage of a plan for a prompt of known length: after ``layer``'s attention ``blocks`` blocks go on."""

    layer: int
    blocks: int


@dataclass(frozen=True)
class Windows:
    """How far back each KV head of a layer looks (layers that are not in ``reach`` see everything), in the first
    ``rows`` of a context; the rows behind them see everything too."""

    reach: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    rows: int = 0

    def same_rows(self, other: Windows) -> float:
        """How many first rows of a context come out the same under both: all (inf), or those before they differ."""
        if self == other:
            return math.inf
        return min(self.rows, other.rows) if self.reach == other.reach else 0


@dataclass(frozen=True)
class Schedule:
    """How one prompt is read: all that the layer loop needs to know of the rule.

    ``cuts``: the layers after whose attention blocks of the prompt leave, chosen as ``plan`` says; none: every token
    passes every layer. ``windows``: how far back attention looks before the first cut. ``boundary``: the layer whose
    hidden states are kept for another question; that of the first stage also while a prompt is too short for a cut, as
    it may grow. ``why_dense``: in words, why a plan that could cut or limit something leaves this prompt whole.
    """

    plan: PrunePlan = field(default_factory=PrunePlan)
    cuts: tuple[Cut, ...] = ()
    windows: Windows = field(default_factory=Windows)
    boundary: int | None = None
    why_dense: str = ""


DENSE = Schedule()


def schedule(plan: PrunePlan | None, tokens: int) -> Schedule:
    """What ``plan`` (None: dense) does to a prompt of ``tokens``."""
    if plan is None or plan.does_nothing:
        return DENSE
    boundary = plan.stages[0].layer if plan.stages else None
    if tokens < plan.min_tokens:
        why = f"the prompt has {tokens:,} tokens, and this plan leaves prompts under {plan.min_tokens:,} whole"
        return Schedule(plan, boundary=boundary, why_dense=why)
    cuts, windows = _cuts(plan, tokens), _windows(plan, tokens)
    if cuts:
        boundary = cuts[0].layer
    why = "" if cuts or windows.rows else f"every stage of the plan would keep all of these {tokens:,} tokens"
    return Schedule(plan, cuts, windows, boundary, why)


def _windows(plan: PrunePlan, tokens: int) -> Windows:
    """Whole runs of rows, so that no tile is in two minds."""
    reach = {window.layer: window.reach for window in plan.windows if any(window.reach)}
    rows = max(0, tokens - plan.full_rows) // RUN * RUN
    return Windows(reach, rows) if reach and rows else Windows()


def _cuts(plan: PrunePlan, tokens: int) -> tuple[Cut, ...]:
    """The stages that leave something out of a prompt of ``tokens``."""
    total = -(-tokens // plan.block)
    always = plan.sink_blocks + local_blocks(plan, tokens)
    cuts: list[Cut] = []
    for stage in plan.stages:
        keep = max(plan.min_keep, math.ceil(stage.keep * tokens)) if isinstance(stage.keep, float) else stage.keep
        blocks = max(always, -(-keep // plan.block))
        before = cuts[-1].blocks if cuts else total
        if blocks < before:
            cuts.append(Cut(stage.layer, blocks))
    if not cuts and plan.keeps_all:
        # A plan that keeps everything runs through the same code, to be compared with dense.
        cuts = [Cut(stage.layer, total) for stage in plan.stages]
    return tuple(cuts)


def local_blocks(plan: PrunePlan, rows: int) -> int:
    """The last blocks that always stay: ``local_blocks`` whole ones, a ragged last one, all of the query window."""
    ragged = 1 if rows % plan.block else 0
    window = -(-rows // plan.block) - max(0, rows - plan.query_window) // plan.block
    return max(plan.local_blocks + ragged, window)
