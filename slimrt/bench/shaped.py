"""Time to first token and decode speed of a model of a known shape with random weights, on either backend.

No file is needed, so any machine can tell what a well-known model would do on it. What moves between host and device is
timed on the streams themselves, to tell how much of it hides behind compute.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimrt.bench.synthetic import SHAPES, SyntheticModel
from slimrt.bench.ttft import environment
from slimrt.config import CacheConfig
from slimrt.engine import Engine
from slimrt.errors import SettingError
from slimrt.models.llama import Llama
from slimrt.ops.backend import open_backend
from slimrt.ops.protocol import Ops
from slimrt.output import counted
from slimrt.prune.plan import PrunePlan, Stage, check_plan
from slimrt.session import Session

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PLANS", "ShapedResult", "ShapedRow", "measure", "open_engine", "open_model", "run"]

PLANS: dict[str, PrunePlan | None] = {
    "off": None,
    "8k/4k/2k": PrunePlan((Stage(10, 8192), Stage(20, 4096), Stage(30, 2048))),  # SlimInfer, arXiv 2508.06447
    "1/2,1/4": PrunePlan((Stage(10, 0.5), Stage(20, 0.25))),
    "tiny": PrunePlan((Stage(1, 0.5), Stage(2, 0.25)), block=16),  # for the shape of that name
}
_WARM_UP = 1024  # tokens: every kernel is compiled, every matrix touched
_WARM_TOKENS = 3  # decoded before the clock runs

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ShapedRow:
    """One prompt length under one plan; medians. ``copy_s``: seconds of copies in the prompt, ``exposed_s``: of them
    those that compute stood still for (both None on a CPU); ``bytes_moved``: in both directions."""

    length: int
    plan: str
    kv_budget: int | None
    ttft_s: float
    runs: tuple[float, ...]
    decode_tok_s: float | None
    kept: tuple[int, ...]
    bytes_moved: int
    copy_s: float | None
    exposed_s: float | None

    @property
    def hidden_share(self) -> float | None:
        """The share of copy time that compute did not wait for."""
        if not self.copy_s or self.exposed_s is None:
            return None
        return max(0.0, 1 - self.exposed_s / self.copy_s)


@dataclass(frozen=True)
class ShapedResult:
    """``rows`` by length, then by plan; ``settings`` and ``environment`` are plain data."""

    rows: tuple[ShapedRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = [dataclasses.asdict(row) | {"hidden_share": row.hidden_share} for row in self.rows]
        return {"settings": self.settings, "environment": self.environment, "rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """A rich table: one line a length and plan."""
        from rich.table import Table
        from rich.text import Text

        s, env = self.settings, self.environment
        caption = (
            f"medians of {counted(s['repeats'], 'run')}; {env['device']}; slimrt {env['slimrt']}\n"
            f"{env['date']}, {env['system']}"
        )
        title = f"{s['shape']}, {s['type']}, random weights"
        table = Table(
            title=Text(title), title_justify="left", caption=Text(caption), caption_justify="left", box=None,
            padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for heading in ("prompt", "plan", "KV rows", "TTFT s", "vs", "tok/s", "hidden", "kept"):
            table.add_column(heading, justify="left" if heading in ("plan", "kept") else "right", no_wrap=True)
        first: dict[int, float] = {}
        for row in self.rows:
            reference = first.setdefault(row.length, row.ttft_s)
            table.add_row(
                str(row.length),
                Text(row.plan),
                "all" if row.kv_budget is None else str(row.kv_budget),
                f"{row.ttft_s:.3f}",
                f"{reference / row.ttft_s:.2f}x",
                "" if row.decode_tok_s is None else f"{row.decode_tok_s:.1f}",
                "" if row.hidden_share is None else f"{100 * row.hidden_share:.0f}%",
                " ".join(map(str, row.kept)),
            )
        return table


class CopyMeter:
    """Times copies and waits of a GPU backend by events on its streams while it is entered; nothing on a CPU."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._copies: list[Any] = []
        self._waits: list[Any] = []

    def __enter__(self) -> CopyMeter:
        if self._ops.name == "cuda":
            self._ops.observed = (self._copies, self._waits)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ops.name == "cuda":
            self._ops.observed = None

    def seconds(self) -> tuple[float | None, float | None]:
        """Of copies, and of compute standing still for them."""
        if self._ops.name != "cuda":
            return None, None
        self._ops.finish()
        return self._ops.total(self._copies), self._ops.total(self._waits)


def open_model(ops: Ops, shape: str, kind: str) -> Llama:
    """A model of ``shape`` whose matrices have the type ``kind``, on ``ops``."""
    config = SHAPES[shape]
    return Llama(config, SyntheticModel(config, kind), ops)  # type: ignore[arg-type]


def open_engine(ops: Ops, shape: str, kind: str, cache: CacheConfig | None = None) -> Engine:
    """An engine for ``open_model``'s model."""
    return Engine(open_model(ops, shape, kind), ops, cache)


def measure(engine: Engine, length: int, plan: str, *, repeats: int = 1, decode_tokens: int = 0) -> ShapedRow:
    """Read a random prompt of ``length`` tokens under ``PLANS[plan]``, then decode; the first tokens decoded, during
    which graphs are captured and kernels compiled, are not timed."""
    chosen, cache = PLANS[plan], engine.cache_config
    if chosen is not None:
        check_plan(chosen, engine.config)
    ids = np.random.default_rng(length).integers(0, engine.config.vocab_size, length).tolist()
    runs, speeds, meters = [], [], []
    kept: tuple[int, ...] = ()
    moved = 0
    for _ in range(repeats):
        session = Session(engine, length + _WARM_TOKENS + decode_tokens + 1)
        engine.ops.finish()
        with CopyMeter(engine.ops) as meter:
            begun = time.perf_counter()
            kept = session.prefill(ids, chosen).stages
            runs.append(time.perf_counter() - begun)
        meters.append(meter.seconds())
        if cache is not None and cache.budget is not None:
            transfers: Any = session.context.cache
            moved = transfers.transfers.bytes_to_host + transfers.transfers.bytes_to_device
        if decode_tokens:
            for token in ids[:_WARM_TOKENS]:
                session.extend([token])
        begun = time.perf_counter()
        for token in ids[:decode_tokens]:
            session.extend([token])
        if decode_tokens:
            speeds.append(decode_tokens / (time.perf_counter() - begun))
        session.context.cache.close()
        del session
    copied, exposed = sorted(meters, key=lambda pair: pair[0] or 0)[len(meters) // 2]
    return ShapedRow(
        length=length,
        plan=plan,
        kv_budget=None if cache is None else cache.budget,
        ttft_s=statistics.median(runs),
        runs=tuple(runs),
        decode_tok_s=statistics.median(speeds) if speeds else None,
        kept=kept,
        bytes_moved=moved,
        copy_s=copied,
        exposed_s=exposed,
    )


def run(
    device: str = "auto",
    shape: str = "smollm2-135m",
    kind: str = "Q4_0",
    lengths: Sequence[int] = (2048, 4096),
    plans: Sequence[str] = ("off",),
    kv_budget: int | None = None,
    repeats: int = 1,
    decode_tokens: int = 16,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ShapedResult:
    """Measure prompts of ``lengths`` random tokens under each of ``plans`` (of ``PLANS``) on ``device``.

    Raises SettingError for values out of range, DeviceError for a device that does not work or is too small.
    """
    if shape not in SHAPES:
        raise SettingError(f"shape {shape!r}: must be one of {', '.join(SHAPES)}")
    for plan in plans:
        if plan not in PLANS:
            raise SettingError(f"plan {plan!r}: must be one of {', '.join(PLANS)}")
    for name, values, least in (("lengths", lengths, 1), ("plans", [len(plans)], 1), ("repeats", [repeats], 1)):
        if not values or min(values) < least:
            raise SettingError(f"{name} {list(values)}: at least one, none below {least}")
    ops = open_backend(device, threads=threads).ops
    lengths = sorted(set(lengths))
    cache = CacheConfig(lengths[-1] + _WARM_TOKENS + decode_tokens + 1, kv_budget) if kv_budget is not None else None
    engine = open_engine(ops, shape, kind, cache)
    Session(engine, _WARM_UP + 2).prefill([1] * min(_WARM_UP, lengths[-1]), PLANS[plans[0]])
    rows = []
    for number, (length, plan) in enumerate(_turns(lengths, plans)):
        if progress:
            progress(number, len(lengths) * len(plans), f"{length} tokens, {plan}")
        rows.append(measure(engine, length, plan, repeats=repeats, decode_tokens=decode_tokens))
    if progress:
        progress(len(rows), len(rows), "")
    settings = {
        "device": device,
        "shape": shape,
        "type": kind,
        "lengths": lengths,
        "plans": list(plans),
        "kv_budget": kv_budget,
        "repeats": repeats,
        "decode_tokens": decode_tokens,
    }
    return ShapedResult(tuple(rows), settings, about(ops))


def about(ops: Any) -> dict[str, Any]:
    """Where the measurement was taken, and on what."""
    import slimrt

    where = environment()
    device = str(ops.device) if ops.name == "cuda" else f"{where['cpu']}, {counted(ops.threads, 'thread')}"
    return where | {"slimrt": slimrt.__version__, "numpy": np.__version__, "device": device}


def _turns(lengths: Sequence[int], plans: Sequence[str]) -> Iterator[tuple[int, str]]:
    for length in lengths:
        for plan in plans:
            yield length, plan
