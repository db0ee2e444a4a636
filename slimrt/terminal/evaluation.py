"""``slimrt eval``: plans against the dense run on identical prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimrt.errors import SettingError
from slimrt.output import check_output
from slimrt.terminal.guard import note
from slimrt.terminal.loading import load_model
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar

if TYPE_CHECKING:
    from slimrt.eval.report import EvalReport

__all__ = ["EvalSettings", "evaluate"]


@dataclass(frozen=True)
class EvalSettings:
    """What is measured, and where it goes beside the terminal. ``plans``: as --prune takes them; none: the presets, or
    the ``kv_budget`` alone where there is one."""

    plans: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    text: Path | None
    output: Path | None
    png: Path | None
    force: bool
    reports: tuple[Path, ...] = ()
    kv_budget: int | None = None
    ttft_repeats: int = 3


def evaluate(settings: EvalSettings, load: LoadSettings, *, as_json: bool) -> None:
    """Run the evaluation, or read the ``reports`` of earlier ones; tables, or with ``as_json`` the whole report, go to
    stdout."""
    from slimrt.eval.plot import check_plotting
    from slimrt.eval.run import context_needed
    from slimrt.eval.run import evaluate as run

    # Whatever can be refused is refused before the model is loaded, and certainly before hours of work.
    plans = _named(settings.plans or (() if settings.kv_budget is not None else ("auto", "fast")))
    needed = context_needed(settings.tasks, settings.lengths)
    for path in (settings.output, settings.png):
        if path is not None:
            given = [*settings.reports, *([settings.text] if settings.text else [])]
            check_output(path, sources=given, force=settings.force)
    if settings.output is not None and settings.output == settings.png:
        raise SettingError(f"--output and --png both name {settings.png}; name two files")
    if settings.png is not None:
        check_plotting()
        if not settings.ttft_repeats:
            raise SettingError("--png draws quality against time to first token: it needs --ttft-repeats of at least 1")
    if settings.reports:
        from slimrt.eval.report import merged, read_report

        _show(merged([read_report(path) for path in settings.reports]), settings, as_json=as_json)
        return
    load = load if load.ctx is not None else replace(load, ctx=needed)
    llm = load_model(load)
    budgeted = {}
    if settings.kv_budget is not None:
        budgeted[f"kv {settings.kv_budget}"] = load_model(replace(load, kv_budget=settings.kv_budget))
    with progress_bar("evaluating") as progress:
        report = run(
            llm, plans, settings.tasks, settings.lengths, settings.samples, settings.seed, settings.text, progress,
            ttft_repeats=settings.ttft_repeats, budgeted=budgeted,
        )  # fmt: skip
    _show(report, settings, as_json=as_json)


def _show(report: EvalReport, settings: EvalSettings, *, as_json: bool) -> None:
    """The report where it is wanted."""
    from slimrt.eval.plot import save_png

    if settings.output is not None:
        report.save_json(settings.output)
    if settings.png is not None:
        save_png(report, settings.png)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    from rich.console import Console

    from slimrt.eval.table import quality_tables, ttft_table

    console = Console()
    for table in (*quality_tables(report), *([ttft_table(report)] if report.timings else [])):
        console.print(table)
        console.print()
    for name, plan in report.plans.items():
        if plan["plan"] is not None:
            note(f"plan {name}: {plan['source']}")


def _named(plans: Sequence[str]) -> dict[str, str]:
    """Presets go by their own name, files by theirs without the ending."""
    named: dict[str, str] = {}
    for plan in plans:
        name = plan if plan in ("off", "auto", "fast") else Path(plan).name.removesuffix(".json")
        if name in named:
            raise SettingError(
                f"--prune {plan}: a plan named '{name}' was given already; rename the file or leave one out"
            )
        named[name] = plan
    return named
