"""``slimrt calibrate``: presets of a model, measured and stored beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from slimrt.terminal.guard import note
from slimrt.terminal.loading import find_model, load_model
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from slimrt.calibrate.journal import Journal
    from slimrt.calibrate.search import Calibration

__all__ = ["CalibrateSettings", "calibrate_model"]

_FAST = {"kl": 4.0, "recall": 2.0, "nll": 4.0, "answer": 8 / 3}  # times what `auto` may lose
_WORST_ANSWER = 2.0  # nats that no single answer may lose more of under `auto`


@dataclass(frozen=True)
class CalibrateSettings:
    """The bounds of the preset ``auto``, what is measured, and where the presets go (None: beside the model)."""

    max_kl: float
    max_recall_drop: float
    max_nll_rise: float
    max_answer_loss: float
    length: int
    samples: int
    seed: int
    text: Path | None
    output: Path | None
    force: bool


def calibrate_model(settings: CalibrateSettings, load: LoadSettings, *, as_json: bool) -> None:
    """Run the search and store its presets; a table, or with ``as_json`` the whole file, goes to stdout."""
    from slimrt.calibrate.losses import Bounds
    from slimrt.calibrate.search import calibrate, calibration_context
    from slimrt.models import read_config
    from slimrt.output import check_output, write_atomically
    from slimrt.prune.presets import preset_path
    from slimrt.weights.gguf import GGUFFile

    path = find_model(load.model)
    target = settings.output or preset_path(path)
    check_output(target, sources=[path, *_given(settings.text)], force=settings.force)
    auto = Bounds(
        settings.max_kl, settings.max_recall_drop, settings.max_nll_rise, settings.max_answer_loss, _WORST_ANSWER
    )
    fast = Bounds(**{name: getattr(auto, name) * factor for name, factor in _FAST.items()})
    trained = read_config(GGUFFile(path)).ctx_train
    llm = load_model(replace(load, ctx=calibration_context(settings.length, trained)))
    journals: list[Journal] = []

    def begun(journal: Journal) -> None:
        journals.append(journal)
        if journal.resumed:
            note(f"goes on after {journal.resumed} measurements of an unfinished calibration with these settings")

    try:
        with progress_bar("calibrating") as progress:
            found, journal = calibrate(
                llm,
                {"auto": auto, "fast": fast},
                target.with_name(f".{target.name}.journal"),
                length=settings.length,
                samples=settings.samples,
                seed=settings.seed,
                text=settings.text,
                progress=progress,
                begun=begun,
            )
    except KeyboardInterrupt:
        if journals:
            note(f"{len(journals[0])} measurements are kept; the same command goes on with them")
        raise
    content = found.to_dict()
    write_atomically(target, (json.dumps(content, indent=1) + "\n").encode())
    journal.remove()
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(_table(found))
    for name, preset in found.presets.items():
        if preset is None:
            note(f"{name}: no plan stays within the bounds; it runs dense; allow more (--max-kl, --max-recall-drop)")
    note(f"wrote {target}")


def _given(path: Path | None) -> list[Path]:
    return [] if path is None else [path]


def _table(found: Calibration) -> Table:
    from rich.table import Table

    title = "Presets, against the dense run, prompts of {:,} and {:,} tokens".format(*found.lengths)
    table = Table(title=title, title_justify="left")
    for heading in ("preset", "cuts", "TTFT", "KL", "recall drop", "nats more", "answers lose (worst)"):
        table.add_column(heading, justify="left" if heading in ("preset", "cuts") else "right")
    for name, preset in found.presets.items():
        if preset is None:
            table.add_row(name, "none: dense", "1.00x")
            continue
        bounds, dense = found.bounds[name], median(found.ttft_s["dense"])
        low, high = preset.recall_interval
        cheaper, dearer = preset.nll_interval
        table.add_row(
            name,
            ", ".join(f"layer {stage.layer} keep {stage.keep:g}" for stage in preset.plan.stages),
            f"{dense / median(found.ttft_s[name]):.2f}x",
            f"{preset.kl:.3f} (<= {bounds.kl:g})",
            f"{preset.recall_drop:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{preset.nll_rise:+.3f} [{cheaper:+.3f}, {dearer:+.3f}]",
            f"{preset.answer_loss:+.2f} ({preset.answer_worst:+.2f})",
        )
    return table
