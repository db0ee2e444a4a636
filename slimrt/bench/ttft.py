"""Time to first token and decode speed of slimrt, side by side with other programs, in one run."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimrt.bench.contenders import Measurement, Setup, check_installed
from slimrt.bench.peak import decode_bytes, matrix_bytes, prefill_operations
from slimrt.bench.process import ContenderProcess
from slimrt.errors import SettingError
from slimrt.eval.text import corpus_from_text, load_corpus
from slimrt.models import read_config
from slimrt.ops.numpy.workers import available_cores
from slimrt.output import counted
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LENGTHS", "BenchResult", "BenchRow", "environment", "run"]

LENGTHS = (512, 2048, 4096, 8000)
_WARM_UP = 256  # tokens: enough to start threads, load code and touch every weight
_ENVIRONMENT = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

Progress = Callable[[int, int, str], None]  # (measurements done, in all, what is measured next)


@dataclass(frozen=True)
class BenchRow:
    """All runs of one contender at one prompt length; ``runs`` in the order in which they were taken."""

    contender: str
    length: int
    runs: tuple[Measurement, ...]

    @property
    def ttft_s(self) -> float:
        """The median, in seconds."""
        return statistics.median(run.ttft_s for run in self.runs)

    @property
    def ttft_range(self) -> tuple[float, float]:
        """The quickest and the slowest run, in seconds."""
        return min(run.ttft_s for run in self.runs), max(run.ttft_s for run in self.runs)

    @property
    def decode_tok_s(self) -> float:
        """The median, in tokens a second."""
        return statistics.median(run.decode_tok_s for run in self.runs)

    @property
    def decode_range(self) -> tuple[float, float]:
        """The slowest and the quickest run, in tokens a second."""
        return min(run.decode_tok_s for run in self.runs), max(run.decode_tok_s for run in self.runs)

    @property
    def follow_up_s(self) -> float | None:
        """The median, in seconds, of the time to the first token of the first further answer; None without one."""
        times = [run.further_s[0] for run in self.runs if run.further_s]
        return statistics.median(times) if times else None

    @property
    def waiting_s(self) -> float:
        """The median, in seconds, of the times to the first tokens of all answers together."""
        return statistics.median(run.ttft_s + sum(run.further_s) for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        return max(run.peak_bytes for run in self.runs)


@dataclass(frozen=True)
class BenchResult:
    """``rows`` by length, then by contender; ``settings`` and ``environment`` are plain data.

    Contenders are named "slimrt PLAN" and as in ``vs``. Ratios are against ``reference``: the first program that slimrt
    was measured against, else slimrt's first plan.
    """

    rows: tuple[BenchRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @property
    def reference(self) -> str:
        return (*self.settings["vs"], f"slimrt {self.settings['plans'][0]}")[0]

    def row(self, contender: str, length: int) -> BenchRow:
        return next(row for row in self.rows if (row.contender, row.length) == (contender, length))

    def speedup(self, row: BenchRow) -> float:
        """How many times sooner than the reference's the first token is there."""
        return self.row(self.reference, row.length).ttft_s / row.ttft_s

    def of_peak(self, row: BenchRow) -> tuple[float, float] | None:
        """Shares of slimrt's measured peaks: of products in a dense prefill, of weights and cache read in decode.

        None for other programs and other plans, whose work is not counted.
        """
        if row.contender != "slimrt off" or "peak" not in self.environment:
            return None
        peak, work = self.environment["peak"], self.settings["work"]
        middle = row.length + self.settings["decode_tokens"] // 2
        read = decode_bytes(work["matrix_bytes"], self.environment["kv_per_token"], middle)
        operations = work["prefill_operations"][str(row.length)]
        return operations / row.ttft_s / peak["operations_s"], read * row.decode_tok_s / peak["bytes_s"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "reference": self.reference,
            "rows": [
                {
                    "contender": row.contender,
                    "length": row.length,
                    "ttft_s": row.ttft_s,
                    "ttft_range_s": list(row.ttft_range),
                    "decode_tok_s": row.decode_tok_s,
                    "decode_range_tok_s": list(row.decode_range),
                    "ttft_speedup": self.speedup(row),
                    "follow_up_s": row.follow_up_s,
                    "waiting_s": row.waiting_s,
                    "peak_bytes": row.peak_bytes,
                    "of_peak": self.of_peak(row),
                    "runs": [asdict(measurement) for measurement in row.runs],
                }
                for row in self.rows
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """A rich table of 80 columns: medians and ratios; ranges and shares of the peaks are in ``to_dict``."""
        from rich.table import Table
        from rich.text import Text

        title = (
            f"Time to first token, {Path(self.settings['model']).name}, {counted(self.settings['threads'], 'thread')}"
        )
        # Text, not markup: names and versions come from outside.
        table = Table(
            title=Text(title), title_justify="left", caption=Text(self._caption()), caption_justify="left", box=None,
            padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        asked, several, budget = (self.settings[name] for name in ("follow_up", "questions", "kv_budget"))
        again = [*(["again s"] if asked else []), *(["all s"] if asked and several > 1 else [])]
        memory = ["KV MiB", "on host"] if budget else ["MiB"]
        for heading in ("prompt", "", "TTFT s", "vs", "tok/s", "vs", *again, *memory, "kept"):
            left = heading in ("", "kept")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "kept", overflow="fold")
        length = 0
        for row in self.rows:
            if row.length != length and length:
                table.add_row()
            reference = self.row(self.reference, row.length)
            decode = f"{row.decode_tok_s / reference.decode_tok_s:.2f}x" if reference.decode_tok_s else ""
            taken = (
                [f"{n / 2**20:.1f}" for n in row.runs[0].kv_bytes or ()] or ["", ""]
                if budget
                else [f"{row.peak_bytes / 2**20:.0f}"]
            )
            table.add_row(
                str(row.length) if row.length != length else "",
                Text(row.contender),
                f"{row.ttft_s:.3f}",
                f"{self.speedup(row):.2f}x",
                f"{row.decode_tok_s:.1f}",
                decode,
                *([f"{row.follow_up_s:.3f}", f"{row.waiting_s:.2f}"] if row.follow_up_s else ["", ""])[: len(again)],
                *taken,
                " ".join(map(str, row.runs[0].kept)),
            )
            length = row.length
        return table

    def _fetched_lines(self) -> list[str]:
        """Of each run under a budget, how much decode fetched and how much of it came in time."""
        lines = []
        for row in self.rows:
            runs = [run.fetched for run in row.runs if run.fetched is not None]
            if not runs:
                continue
            nbytes, in_time, waits = (sum(values) for values in zip(*runs, strict=True))
            share = f"{in_time / nbytes:.0%} of it in time; it waited {waits / len(runs):.0f} times" if nbytes else ""
            lines.append(
                f"{row.length} tokens, {row.contender}: decode fetched {nbytes / len(runs) / 2**20:.1f} MiB a run"
                + (f", {share}" if share else "")
            )
        if lines and self.environment["backend"]["name"] == "fast":
            lines.append("on a CPU the thread that computes copies what it fetches itself: none of it is in time")
        return lines

    def _peak_lines(self) -> list[str]:
        """Of each dense run of slimrt, the share of what the machine can do."""
        shares = [(row.length, share) for row in self.rows if (share := self.of_peak(row)) is not None]
        return [
            f"{length} tokens: {prefill:.0%} of the peak in products, {decode:.0%} of that in decode"
            for length, (prefill, decode) in shares
        ]

    def _caption(self) -> str:
        env = self.environment
        blas = ", ".join(
            f"{b['internal_api']} {b['version']} ({b.get('architecture') or 'unknown'} kernels)" for b in env["blas"]
        )
        programs = ("slimrt", "numpy", "llama_cpp_python", "openvino_genai", "python")
        versions = [f"{name} {env[name]}" for name in programs if name in env]
        asked, several = self.settings["follow_up"], self.settings["questions"]
        lines = [
            f"medians of {counted(self.settings['repeats'], 'run')}, programs in turn; x: times as fast as "
            f"{self.reference}",
            *self._peak_lines(),
            *self._fetched_lines(),
            *([f"again: the first token of a further answer, after a question of {asked} tokens"] if asked else []),
            *([f"all: the first token of {several} further answers as well"] if asked and several > 1 else []),
            f"{env['cpu']}, {env['cores']} cores, {' '.join(env['cpu_features'])}; load average before {env['load']}",
            f"{', '.join(versions)}; {blas or 'BLAS unknown'}",
            f"slimrt computes on {env['backend']['why']}; measured peak {env['peak']['operations_s'] / 1e9:.0f} "
            f"GFLOP/s in products, {env['peak']['bytes_s'] / 1e9:.1f} GB/s of weights read",
            *(f"{name}={value}" for name, value in env["variables"].items()),
            f"{env['date']}, {env['system']}",
        ]
        return "\n".join(lines)


def run(
    model_path: str | Path,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 3,
    plans: Sequence[str] = ("off",),
    vs: Sequence[str] = (),
    threads: int | None = None,
    decode_tokens: int = 32,
    text: str | None = None,
    progress: Progress | None = None,
    *,
    follow_up: int = 0,
    questions: int = 1,
    kv_budget: int | None = None,
    device: str = "auto",
) -> BenchResult:
    """Measure prompts of ``lengths`` tokens under each of ``plans``, and in each program of ``vs`` ("llama_cpp", or
    "llama_cpp_best" on the model requantised to bfloat16, "openvino").

    All read the same token ids: ``text``, or by default Python's own documentation, repeated where it is too short.
    Each program has its own process and its own copy of the model; for each length and repeat they take turns, so that
    a machine that slows down slows all. Nothing is reused between runs. ``follow_up``: tokens of each of ``questions``
    further questions on the same context. ``kv_budget``: rows of each layer's cache that stay resident, and ``device``:
    what computes, as ``slimrt.load`` takes it (slimrt only). Prompts may exceed the trained context: speed is what is
    measured.

    Raises SettingError for values out of range or a program that is not installed; ModelFileError for an unusable
    model; ComputeError if a program fails. The processes are spawned, so a script must call this under
    ``if __name__ == "__main__"``.
    """
    for name, values, least in (
        ("lengths", lengths, 1),
        ("repeats", (repeats,), 1),
        ("decode_tokens", (decode_tokens,), 0),
        ("follow_up", (follow_up,), 0),
        ("questions", (questions,), 1),
        ("threads", (threads,) if threads is not None else (1,), 1),
    ):
        if not values or min(values) < least:
            raise SettingError(f"{name} {list(values)}: at least one number, none below {least}")
    if questions > 1 and not follow_up:
        raise SettingError(f"questions {questions}: say how many tokens each has (follow_up, --follow-up)")
    if not plans:
        raise SettingError("no prune plan is named; name at least one, such as off")
    for program in vs:
        check_installed(program)
    lengths, plans, vs = sorted(set(lengths)), list(dict.fromkeys(plans)), list(dict.fromkeys(vs))
    file = GGUFFile(model_path)
    ctx = lengths[-1] + decode_tokens + questions * (follow_up + 1) + 2
    threads = threads or available_cores()
    ids = _prompt(Tokenizer.from_gguf(file), text, lengths[-1] + questions * follow_up)
    settings = {
        "model": str(file.path),
        "model_bytes": file.file_size,
        "lengths": lengths,
        "repeats": repeats,
        "plans": plans,
        "vs": vs,
        "threads": threads,
        "decode_tokens": decode_tokens,
        "follow_up": follow_up,
        "questions": questions,
        "kv_budget": kv_budget,
        "device": device,
        "text": "given" if text is not None else "pydoc_data.topics",
    }
    config = read_config(file)
    settings["work"] = {
        "prefill_operations": {str(length): prefill_operations(config, length) for length in lengths},
        "matrix_bytes": matrix_bytes(file),
    }
    about = environment()
    turns = [("slimrt", plan, f"slimrt {plan}") for plan in plans] + [(program, "off", program) for program in vs]
    rows = []
    done, total = 0, len(lengths) * repeats * len(turns)
    setup = Setup(str(file.path), ctx, threads, kv_budget, device)
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ContenderProcess(name, setup)) for name in ("slimrt", *vs)}
        for name, plan, _ in turns:
            about |= processes[name].about
            processes[name].measure(ids[:_WARM_UP], min(decode_tokens, 4), plan)
        for length in lengths:
            runs: dict[str, list[Measurement]] = {label: [] for _, _, label in turns}
            for _ in range(repeats):
                for name, plan, label in turns:
                    if progress:
                        progress(done, total, f"{length} tokens, {label}")
                    begins = range(length, length + questions * follow_up, follow_up) if follow_up else ()
                    further = [ids[begin : begin + follow_up] for begin in begins]
                    runs[label].append(processes[name].measure(ids[:length], decode_tokens, plan, further))
                    done += 1
            rows += [BenchRow(label, length, tuple(measured)) for label, measured in runs.items()]
    if progress:
        progress(done, total, "")
    return BenchResult(tuple(rows), settings, about)


def _prompt(tokenizer: Tokenizer, text: str | None, length: int) -> list[int]:
    """The first ``length`` tokens of the text, with the begin token if the model wants one."""
    corpus = load_corpus(tokenizer) if text is None else corpus_from_text(tokenizer, text)
    begin = tokenizer.encode("")
    body = corpus.tokens.tolist()
    return (begin + body * -(-length // len(body)))[:length]


def environment() -> dict[str, Any]:
    """Where and when a measurement was taken."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "variables": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown CPU"
