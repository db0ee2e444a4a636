"""A picture of a benchmark: time to first token over prompt length."""

from __future__ import annotations

import io
from pathlib import Path

from slimrt.bench.ttft import BenchResult
from slimrt.eval.plot import check_plotting
from slimrt.output import counted, write_atomically

__all__ = ["save_png"]


def save_png(result: BenchResult, path: str | Path) -> None:
    """A line for each contender through its medians, bars from the quickest run to the slowest; whole or not at all.

    Raises SettingError without matplotlib (``check_plotting`` tells before the long work), OSError.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, no display needed.
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for contender in dict.fromkeys(row.contender for row in result.rows):
        rows = [row for row in result.rows if row.contender == contender]
        below = [row.ttft_s - row.ttft_range[0] for row in rows]
        above = [row.ttft_range[1] - row.ttft_s for row in rows]
        axis.errorbar(
            [row.length for row in rows],
            [row.ttft_s for row in rows],
            [below, above],
            fmt="o-",
            capsize=3,
            label=contender,
        )
    axis.set(xlabel="prompt, tokens", ylabel="time to first token, s", xlim=(0, None), ylim=(0, None))
    axis.set_title(
        f"{Path(result.settings['model']).name}, {counted(result.settings['threads'], 'thread')}\n"
        f"{result.environment['cpu']}, "
        f"medians of {counted(result.settings['repeats'], 'run')}, bars from quickest to slowest",
        fontsize=10,
        parse_math=False,  # a dollar sign in a file's name is a dollar sign
    )
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
