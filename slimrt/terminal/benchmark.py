"""``slimrt bench``: time to first token side by side with other programs, the speed of single operations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
from rich.table import Table

from slimrt.errors import SettingError
from slimrt.output import check_output, counted, write_atomically
from slimrt.terminal.loading import find_model, load_model
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.tables import print_wide
from slimrt.terminal.text_input import read_document

if TYPE_CHECKING:
    from slimrt.bench.servers import Versus

__all__ = [
    "BenchSettings", "KernelSettings", "ShapeSettings", "bench_kernels", "bench_serve", "bench_shape",
    "bench_structured", "bench_ttft",
]  # fmt: skip


@dataclass(frozen=True)
class BenchSettings:
    """What is measured. ``plans``: as --prune takes them; ``vs``: other programs; ``png``: where a
    picture goes, ``output``: every run."""

    lengths: tuple[int, ...]
    repeats: int
    plans: tuple[str, ...]
    vs: tuple[str, ...]
    decode_tokens: int
    follow_up: int
    questions: int
    kv_budget: int | None
    device: str
    threads: int | None
    text: Path | None
    png: Path | None
    output: Path | None
    force: bool


def bench_ttft(model: str | None, settings: BenchSettings, *, as_json: bool) -> None:
    """Measure; a table, or with ``as_json`` every run, goes to stdout."""
    from slimrt.bench.ttft import run

    if settings.png is not None:
        from slimrt.eval.plot import check_plotting

        check_plotting()
    _check_outputs(settings)
    text = None if settings.text is None else read_document(settings.text)
    path = find_model(model)
    with progress_bar("measuring") as progress:
        result = run(
            path,
            settings.lengths,
            settings.repeats,
            settings.plans,
            settings.vs,
            settings.threads,
            settings.decode_tokens,
            text,
            progress,
            follow_up=settings.follow_up,
            questions=settings.questions,
            kv_budget=settings.kv_budget,
            device=settings.device,
        )
    if settings.png is not None:
        from slimrt.bench.plot import save_png

        save_png(result, settings.png)
    _tell(result, settings.output, as_json=as_json)


def bench_library(model: str | None, settings: BenchSettings, *, as_json: bool) -> None:
    """Measure what the library of documents saves; a table, or with ``as_json`` every run, goes to stdout."""
    from slimrt.bench.library import measure_library
    from slimrt.ops.numpy.workers import available_cores

    if settings.vs or settings.kv_budget or settings.png or settings.device != "auto":
        raise SettingError(
            "--library: measures slimrt alone, as it is loaded by default and without a picture; leave the others out"
        )
    _check_outputs(settings)
    text = None if settings.text is None else read_document(settings.text)
    path, threads = find_model(model), settings.threads or available_cores()
    with progress_bar("measuring") as progress:
        length = max(settings.lengths)
        result = measure_library(path, length, settings.plans, settings.repeats, threads, text, progress)
    _tell(result, settings.output, as_json=as_json)


class _Report(Protocol):
    def to_json(self) -> str: ...
    def table(self) -> Table: ...


def _tell(result: _Report, output: Path | None, *, as_json: bool) -> None:
    """Everything to the file ``output``, if there is one; a table, or with ``as_json`` everything, to stdout."""
    if output is not None:
        write_atomically(output, (result.to_json() + "\n").encode())
    if as_json:
        click.echo(result.to_json())
    else:
        print_wide(result.table())


def _check_outputs(settings: BenchSettings) -> None:
    """Refused before the long work, not after it."""
    for path in (settings.png, settings.output):
        if path is not None:
            check_output(path, sources=() if settings.text is None else [settings.text], force=settings.force)


@dataclass(frozen=True)
class KernelSettings:
    """What is measured: sizes of ``shape``, ``tokens`` rows; ``kernels``: names, none for all."""

    device: str
    shape: str
    tokens: int
    repeats: int
    kernels: tuple[str, ...]
    threads: int | None


def bench_kernels(settings: KernelSettings, *, as_json: bool) -> None:
    """Measure; a table, or with ``as_json`` every row, goes to stdout."""
    from slimrt.bench.kernels import run

    with progress_bar("measuring") as progress:
        result = run(
            settings.device,
            settings.shape,
            settings.tokens,
            settings.repeats,
            settings.kernels,
            settings.threads,
            progress,
        )
    _tell(result, None, as_json=as_json)


@dataclass(frozen=True)
class ShapeSettings:
    """What is measured: a model of ``shape``, its matrices of type ``kind``. ``plans``: names of ``shaped.PLANS``."""

    device: str
    shape: str
    kind: str
    lengths: tuple[int, ...]
    plans: tuple[str, ...]
    kv_budget: int | None
    repeats: int
    decode_tokens: int
    threads: int | None


def bench_shape(settings: ShapeSettings, *, as_json: bool) -> None:
    """Measure; a table, or with ``as_json`` every row, goes to stdout."""
    from slimrt.bench.shaped import run

    with progress_bar("measuring") as progress:
        result = run(
            settings.device,
            settings.shape,
            settings.kind,
            settings.lengths,
            settings.plans,
            settings.kv_budget,
            settings.repeats,
            settings.decode_tokens,
            settings.threads,
            progress,
        )
    _tell(result, None, as_json=as_json)


def bench_serve(
    load: LoadSettings,
    settings: dict[str, Any],
    llama_server: Path | None,
    repeats: int,
    output: Path | None = None,
    *,
    force: bool = False,
    as_json: bool,
) -> None:
    """Measure, beside llama.cpp's server where it is given; tables, or with ``as_json`` all of it, go to stdout; all of
    it to the file ``output``."""
    from slimrt.bench.serving import run

    if output is not None:
        check_output(output, force=force)
    if llama_server is not None:
        _tell_tables(_bench_servers(load, settings, llama_server, repeats), output, as_json=as_json)
        return
    if load.ctx is None:
        load = replace(load, ctx=max(settings["length"], settings["prompt"]) + settings["tokens"] + 16)
    llm = load_model(load)
    with progress_bar("measuring") as progress:
        result = run(llm, progress=progress, **settings)
    _tell_tables(result, output, as_json=as_json)


class _Tables(Protocol):
    def to_json(self) -> str: ...
    def tables(self) -> Sequence[Table]: ...


def _tell_tables(result: _Tables, output: Path | None, *, as_json: bool) -> None:
    if output is not None:
        write_atomically(output, (result.to_json() + "\n").encode())
    if as_json:
        click.echo(result.to_json())
        return
    for table in result.tables():
        print_wide(table)


def _bench_servers(load: LoadSettings, settings: dict[str, Any], llama_server: Path, repeats: int) -> Versus:
    from slimrt.bench.servers import Setting, run_versus
    from slimrt.ops.numpy.workers import available_cores

    given: dict[str, Any] = {"prune": load.prune, "device": load.device, "draft": load.draft}
    for field in dataclasses.fields(load):
        if (
            field.name not in (*given, "model", "threads", "ctx", "cache")
            and getattr(load, field.name) != field.default
        ):
            raise SettingError(
                f"--{field.name.replace('_', '-')}: llama.cpp's server is started with options of its own; leave it out"
            )
    setting = Setting(
        find_model(load.model), repeats=repeats, threads=load.threads or available_cores(), **given, **settings
    )
    with progress_bar("measuring") as progress:
        return run_versus(setting, llama_server, progress)


def bench_draft(load: LoadSettings, tokens: int, repeats: int, *, as_json: bool) -> None:
    """Measure what guesses bring; two tables, or with ``as_json`` their rows, go to stdout."""
    from slimrt.bench.drafting import measure, pass_costs

    llm = load_model(load)
    with progress_bar("measuring") as progress:
        rows = measure(llm, tokens, repeats, progress)
    passes = pass_costs(llm)
    if as_json:
        about = {"model": llm.config.name, "backend": llm.backend.why, "pass_s": passes}
        click.echo(json.dumps({**about, "texts": [dataclasses.asdict(row) for row in rows]}))
        return
    table = Table("text", "repeats", "tokens/s", "guessing", "factor", "CPU ms a token", "guessing", "factor", "right")
    for row in rows:
        table.add_row(
            row.name, "yes" if row.repeats else "no", f"{row.plain_tok_s:.1f}", f"{row.drafted_tok_s:.1f}",
            f"{row.factor:.2f}", f"{row.plain_cpu_ms:.1f}", f"{row.drafted_cpu_ms:.1f}", f"{row.cpu_factor:.2f}",
            f"{row.accepted} of {row.drafted}",
        )  # fmt: skip
    table.caption = (
        f"{llm.config.name}, {tokens} tokens, medians of {counted(repeats, 'run')} in turns; {llm.backend.why}"
    )
    print_wide(table)
    costs = Table("tokens of a pass", *(f"{count}" for count in passes))
    costs.add_row("ms", *(f"{seconds * 1e3:.1f}" for seconds in passes.values()))
    costs.add_row("of one token's time", *(f"{seconds / passes[1]:.2f}" for seconds in passes.values()))
    print_wide(costs)


def bench_structured(load: LoadSettings, tokens: int, *, as_json: bool) -> None:
    """Measure what grammars cost with the model's vocabulary; a table, or with ``as_json`` its rows, goes to stdout."""
    from slimrt.bench.structured import decode_ms, measure

    llm = load_model(load)
    rows = measure(llm.tokenizer, tokens)
    decode = decode_ms(llm)
    if as_json:
        about = {"model": llm.config.name, "vocabulary": llm.tokenizer.vocab_size, "decode_ms": decode}
        click.echo(json.dumps({**about, "grammars": [dataclasses.asdict(row) for row in rows]}))
        return
    table = Table("grammar", "compile ms", "check µs", "mask µs", "slowest µs", "of decode", "forced", "tokens")
    for row in rows:
        share = (row.check_us + row.mask_us) / 1000 / decode
        table.add_row(
            row.name, f"{row.compile_s * 1e3:.1f}", f"{row.check_us:.0f}", f"{row.mask_us:.0f}",
            f"{row.mask_max_us:.0f}", f"{share:.2%}", f"{row.forced:.0%}", f"{row.tokens}",
        )  # fmt: skip
    table.caption = f"{llm.tokenizer.vocab_size:,} tokens in the vocabulary; the model takes {decode:.1f} ms a token"
    print_wide(table)
