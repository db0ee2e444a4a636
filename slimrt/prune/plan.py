"""A prune plan: where the layers cut, by which score, and how far back their attention looks before the first cut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrt.config import ModelConfig, is_whole
from slimrt.errors import SettingError
from slimrt.paths import user_path
from slimrt.prune.asked import ASKED
from slimrt.prune.reach import SINK
from slimrt.prune.scores import BLOCK_SCORES

__all__ = ["PrunePlan", "Stage", "Window", "check_plan", "read_plan_file"]

_MAX_BLOCK = 1 << 16  # tokens; scores and choices are padded to whole blocks
_MAX_PLAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """One cut: once ``layer`` has keys and values of all, ``keep`` prompt tokens go on (a fraction if float, a count if
    int); the others do not attend there."""

    layer: int
    keep: float | int


@dataclass(frozen=True)
class Window:
    """A layer whose attention looks back ``reach`` rows only, given for each KV head (0: to the beginning).

    The first rows are read as well (the attention sink); the rule to the row is in ``slimrt.prune.reach``.
    """

    layer: int
    reach: tuple[int, ...]


def _stages(entries: Any) -> tuple[Stage, ...]:
    """Stages, or the dictionaries that JSON has in their place."""
    if not isinstance(entries, (tuple, list)):
        raise SettingError(f"prune plan: stages {entries!r} must be a list of {{layer, keep}}")
    stages = []
    for entry in entries:
        if isinstance(entry, Mapping) and set(entry) == {"layer", "keep"}:
            entry = Stage(**entry)
        if not isinstance(entry, Stage):
            raise SettingError(f"prune plan: stage {entry!r} must have a layer and keep, and nothing else")
        if not is_whole(entry.layer):
            raise SettingError(f"prune plan: layer {entry.layer!r} must be a whole number")
        if not (is_whole(entry.keep) or isinstance(entry.keep, float)):
            raise SettingError(f"prune plan: layer {entry.layer} keeps {entry.keep!r}; must be a fraction or a count")
        stages.append(entry)
    return tuple(stages)


def _windows(entries: Any) -> tuple[Window, ...]:
    """Windows, or the dictionaries that JSON has in their place."""
    if not isinstance(entries, (tuple, list)):
        raise SettingError(f"prune plan: windows {entries!r} must be a list of {{layer, reach}}")
    windows = []
    for entry in entries:
        if isinstance(entry, Mapping) and set(entry) == {"layer", "reach"}:
            entry = Window(**entry)
        if not isinstance(entry, Window):
            raise SettingError(f"prune plan: window {entry!r} must have a layer and reach, and nothing else")
        if not is_whole(entry.layer):
            raise SettingError(f"prune plan: window of layer {entry.layer!r}: must be a whole number")
        if not isinstance(entry.reach, (tuple, list)) or not all(map(is_whole, entry.reach)):
            raise SettingError(
                f"prune plan: layer {entry.layer} reaches {entry.reach!r}; must be a list of rows, one for each KV head"
            )
        windows.append(Window(entry.layer, tuple(entry.reach)))
    return tuple(windows)


@dataclass(frozen=True)
class PrunePlan:
    """Which prompt tokens leave the forward pass, and after which layers (SlimInfer, arXiv 2508.06447).

    Tokens are grouped into blocks of ``block``, blocks into units of ``unit``. The first ``sink_blocks`` and the last
    ``local_blocks`` blocks always stay; the others compete by ``score``, computed from the queries of the last
    ``query_window`` prompt tokens. A block is wanted at least ``follow`` times as much as the one before it: attention
    finds where a passage begins, and what is read or quoted is what comes next. Prompts of fewer than ``min_tokens``
    run dense, and no fraction leaves fewer than ``min_keep`` tokens: short prompts lose more by the same one.

    With the score "asked" (``slimrt.prune.asked``) the queries are those of all tokens that ask, wherever they stand,
    and three more numbers say what a prompt in doubt gets: a block that scores ``sure`` (0 to 1; 0: no such rule) stays
    whatever its rank, as long as no more than ``most`` (a fraction) of the prompt's tokens stay at a cut; where not one
    block scores that high, nobody knows what is wanted, and ``most`` stay. Stages before layer ``late`` are left out
    where a question stands before the document: in early layers the last tokens do not know it yet.

    ``questions`` (0: no end): so many prompts in a row on the same document are cut. With the next one the layers
    behind the first cut read the whole of it, and from then on a further question costs little: each cut again would
    cost more than it saves.

    ``windows`` limit how far back heads of the layers before the first cut look: those layers compute every token, and
    most of the time of a long prompt is their attention. The last ``full_rows`` tokens of the prompt, the question most
    likely, look at everything all the same, and so does what is generated.
    """

    stages: tuple[Stage, ...] = ()
    block: int = 64
    unit: int = 8
    sink_blocks: int = 1
    local_blocks: int = 1
    score: str = "token_mass"
    query_window: int = 16
    follow: float = 1.0
    min_tokens: int = 0
    min_keep: int = 0
    windows: tuple[Window, ...] = ()
    full_rows: int = 256
    sure: float = 0.0
    most: float = 1.0
    late: int = 0
    questions: int = 0

    @property
    def does_nothing(self) -> bool:
        """Whether prompts run dense under it, whatever their length."""
        return not self.stages and not self.windows

    @property
    def keeps_all(self) -> bool:
        """Whether every stage keeps every token: the plan that must equal the dense run bit for bit."""
        return not self.windows and all(isinstance(stage.keep, float) and stage.keep == 1 for stage in self.stages)

    @property
    def without_cuts(self) -> PrunePlan:
        """Its windows alone."""
        return dataclasses.replace(self, stages=(), late=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _stages(self.stages))
        object.__setattr__(self, "windows", _windows(self.windows))
        if not isinstance(self.score, str):
            raise SettingError(f"prune plan: score {self.score!r} must be a name")
        not_negative = ("sink_blocks", "min_tokens", "min_keep", "full_rows", "late", "questions")
        for name in ("block", "unit", "query_window", "local_blocks", *not_negative):
            if not is_whole(getattr(self, name)):
                raise SettingError(f"prune plan: {name} {getattr(self, name)!r} must be a whole number")
        for name in ("block", "unit", "query_window", "local_blocks"):
            if getattr(self, name) < 1:
                raise SettingError(f"prune plan: {name} {getattr(self, name)} must be at least 1")
        if self.block > _MAX_BLOCK:
            raise SettingError(f"prune plan: block {self.block} must be at most {_MAX_BLOCK}; 64 is usual")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise SettingError(f"prune plan: {name} {getattr(self, name)} must be at least 0")
        for name in ("follow", "sure", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise SettingError(f"prune plan: {name} {value!r} must lie in [0, 1]")
        if self.block % self.unit:
            raise SettingError(f"prune plan: block {self.block} must be a multiple of unit {self.unit}")
        for entries in (self.stages, self.windows):
            layers = [entry.layer for entry in entries]
            if layers != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise SettingError(f"prune plan: layers {layers} must be non-negative and ascending")
        for window in self.windows:
            if any(rows < 0 or rows % SINK for rows in window.reach):
                raise SettingError(
                    f"prune plan: layer {window.layer} reaches {list(window.reach)} rows; each must be a multiple of "
                    f"{SINK}, or 0 for no limit"
                )
            if self.stages and window.layer > max(self.stages[0].layer, self.late):
                raise SettingError(
                    f"prune plan: the window of layer {window.layer} lies behind the first cut, at layer "
                    f"{max(self.stages[0].layer, self.late)}; windows belong to the layers up to it"
                )
        for stage in self.stages:
            if isinstance(stage.keep, float):
                if not 0 < stage.keep <= 1:
                    raise SettingError(f"prune plan: layer {stage.layer} keeps {stage.keep}; a fraction lies in (0, 1]")
            elif stage.keep < (self.sink_blocks + self.local_blocks) * self.block:
                always = (self.sink_blocks + self.local_blocks) * self.block
                raise SettingError(
                    f"prune plan: layer {stage.layer} keeps {stage.keep} tokens, fewer than its sink and local blocks "
                    f"hold ({always}); keep more or lower sink_blocks, local_blocks"
                )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrunePlan:
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise SettingError(
                f"prune plan: unknown keys {sorted(unknown)}; known are {[f.name for f in dataclasses.fields(cls)]}"
            )
        try:
            return cls(**data)
        except TypeError as error:  # a value of a kind that no comparison knows
            raise SettingError(f"prune plan: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> PrunePlan:
        """The plan in a JSON file that ``to_json`` made. Raises SettingError for anything else."""
        return cls.from_dict(read_plan_file(user_path(path)))


def read_plan_file(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, a plan or a file of presets. Raises SettingError where there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_PLAN_BYTES + 1)
        if len(raw) > _MAX_PLAN_BYTES:
            raise ValueError(f"more than {_MAX_PLAN_BYTES} bytes")
        data = json.loads(raw)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; name a file that PrunePlan.to_json or calibrate wrote") from None
    except RecursionError:
        raise SettingError(f"{path}: no prune plan (nested too deeply); remove the file or name another") from None
    except ValueError as error:
        raise SettingError(f"{path}: no prune plan ({str(error)[:100]}); remove the file or name another") from None
    if not isinstance(data, dict):
        raise SettingError(f"{path}: holds a JSON {type(data).__name__}; a prune plan is an object; name another file")
    return data


def check_plan(plan: PrunePlan, config: ModelConfig) -> None:
    """Raise SettingError if ``plan`` cannot be run on a model of these sizes."""
    if plan.score not in (*BLOCK_SCORES, ASKED):
        raise SettingError(f"prune plan: score '{plan.score}'; known are {', '.join([*BLOCK_SCORES, ASKED])}")
    for stage in plan.stages:
        # The last layer computes the wanted rows only, so a cut there would cut nothing.
        if stage.layer >= config.n_layers - 1:
            raise SettingError(
                f"prune plan: layer {stage.layer}; this model has layers 0..{config.n_layers - 1} and cuts come before "
                "the last; use a plan made for this model"
            )
        if config.window(stage.layer):
            near = min(config.sees_all(), key=lambda layer: abs(layer - stage.layer), default=None)
            remedy = "no layer sees everything; use prune='off'" if near is None else f"layer {near} sees everything"
            raise SettingError(
                f"prune plan: layer {stage.layer} sees the last {config.window(stage.layer)} tokens only, and cannot "
                f"tell which blocks are wanted; {remedy}"
            )
    for window in plan.windows:
        if window.layer >= config.n_layers or len(window.reach) != config.n_kv_heads:
            raise SettingError(
                f"prune plan: window of layer {window.layer} for {len(window.reach)} KV heads; this model has layers "
                f"0..{config.n_layers - 1} and {config.n_kv_heads} KV heads; use a plan made for this model"
            )
        if config.window(window.layer):
            raise SettingError(
                f"prune plan: window of layer {window.layer}, which has one of {config.window(window.layer)} tokens of "
                "its own; leave it out"
            )
