"""Quality against time to first token, one point a plan, the Pareto front drawn through those that nothing beats; what
answers to questions lose, shape by shape."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from slimrt.errors import SettingError
from slimrt.eval.report import DENSE, HIGHER_IS_BETTER, MARGINS, QUESTIONS, RULER_MEAN, EvalReport, front
from slimrt.output import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plotting", "save_png"]

PANELS = (
    ("recall", "accuracy", "verbatim recall, top-1 accuracy"),
    ("continuation", "nll", "continuation, nats a token"),
    ("continuation", "kl", "KL to dense, nats a token"),
    (QUESTIONS, "nats", "answers to questions, nats an answer"),
    (RULER_MEAN, "score", "RULER, mean score"),
)


def check_plotting() -> None:
    """Raises SettingError if pictures cannot be drawn here; to be called before the long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError("a picture needs matplotlib, which is not installed; run: pip install 'slimrt[bench]'")


def save_png(report: EvalReport, path: str | Path) -> None:
    """A row of panels for each prompt length, a panel for each measure that was taken, a last one for the shapes of
    questions; whole or not at all.

    Error bars are the 95 % intervals of the paired differences, about the plan's mean. Raises SettingError without
    matplotlib, OSError.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = {(row.task, row.metric) for row in report.summaries}
    panels = [panel for panel in PANELS if panel[:2] in measured]
    lengths = sorted({timing.length for timing in report.timings})
    if not lengths:
        raise SettingError(
            "the picture shows quality against time to first token, and none was measured (ttft_repeats)"
        )
    shapes = list(dict.fromkeys(row.task for row in report.summaries if row.metric == "nats" and row.task != QUESTIONS))
    widths = [4.2] * len(panels) + [6.0] * bool(shapes)
    height = max(3.8, 1.5 + 0.24 * len(shapes))
    # Figure without pyplot: no global state, no display needed.
    figure = Figure(figsize=(max(sum(widths), 7), height * len(lengths) + 0.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{report.model}: quality against time to first token, {report.samples} samples a task\n"
        "filled: on the Pareto front; bars: 95 % of the paired difference to dense",
        fontsize=10,
    )
    axes = figure.subplots(len(lengths), len(widths), squeeze=False, width_ratios=widths)
    for row, length in enumerate(lengths):
        for column, (task, metric, label) in enumerate(panels):
            _panel(axes[row][column], report, length, task, metric)
            axes[row][column].set(
                title=f"prompts of {length:,} tokens", xlabel="time to first token, s (median)", ylabel=label
            )
        if shapes:
            _shapes_panel(axes[row][-1], report, length, shapes)
    # Where plans coincide their names would lie on one another, so they stand in a legend.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _panel(axis: Axes, report: EvalReport, length: int, task: str, metric: str) -> None:
    rows = [row for row in report.summaries if (row.length, row.task, row.metric) == (length, task, metric)]
    # The dense run is the reference and has no interval.
    points = [(DENSE, rows[0].dense, 0.0, 0.0)]
    points += [(row.plan, row.mean, row.difference - row.low, row.high - row.difference) for row in rows]
    seconds = [report.timing(length, name).median_s for name, *_ in points]
    sign = -1.0 if HIGHER_IS_BETTER[metric] else 1.0
    best = front([(x, sign * y) for x, (_, y, _, _) in zip(seconds, points, strict=True)])
    line = sorted((x, y) for x, (_, y, _, _), kept in zip(seconds, points, best, strict=True) if kept)
    axis.plot(*zip(*line, strict=True), "--", linewidth=1, color="black", label="Pareto front", zorder=1)
    for place, (name, y, below, above) in enumerate(points):
        # Rounding may leave a bound on the wrong side of its mean by 1e-17, which errorbar refuses.
        bars = [[max(below, 0.0)], [max(above, 0.0)]]
        colour, fill = f"C{place % 10}", "full" if best[place] else "none"
        axis.errorbar(seconds[place], y, bars, fmt="o", fillstyle=fill, color=colour, capsize=3, label=name)
    axis.set_xlim(0, 1.08 * max(seconds))
    axis.grid(alpha=0.3)


def _shapes_panel(axis: Axes, report: EvalReport, length: int, shapes: list[str]) -> None:
    """For each shape and plan the mean loss of an answer with its interval, and (x) the worst one."""
    plans = [name for name in report.plans if name != DENSE]
    for number, plan in enumerate(plans):
        rows = {
            row.task: row
            for row in report.summaries
            if (row.length, row.metric, row.plan) == (length, "nats", plan) and row.task in shapes
        }
        places = [shapes.index(task) + 0.7 * ((number + 0.5) / len(plans) - 0.5) for task in rows]
        means = [row.difference for row in rows.values()]
        below = [max(row.difference - row.low, 0.0) for row in rows.values()]
        above = [max(row.high - row.difference, 0.0) for row in rows.values()]
        colour = f"C{(number + 1) % 10}"  # as in the other panels, where dense is the first
        axis.errorbar(means, places, xerr=[below, above], fmt="o", markersize=4, color=colour, capsize=2)
        axis.plot([row.worst for row in rows.values()], places, "x", markersize=5, color=colour)
    margin = MARGINS["nats"]
    axis.axvline(0, color="black", linewidth=1)
    axis.axvline(margin, color="black", linewidth=1, linestyle=":")
    axis.set_xscale("symlog", linthresh=margin, linscale=1.5)
    axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axis.set(
        title=f"{length:,} tokens, by shape of question",
        xlabel=f"nats an answer loses (dotted: {margin:g}; x: the worst one)",
        ylim=(len(shapes) - 0.4, -0.6),
    )
    axis.grid(alpha=0.3)
