"""The report on a terminal, in 80 columns where the plans' names are short."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from slimrt.eval.report import QUESTIONS, RULER_MEAN, EvalReport, Summary

__all__ = ["quality_tables", "ttft_table"]

FEW_SAMPLES = 10
HEADLINE = {"recall": ("accuracy", "kl"), "continuation": ("nll", "kl")}  # of the others "score"
UNITS = {"score": "", "accuracy": ", top-1", "nats": "", "nll": ", nats", "kl": ", KL nats"}
STYLES = {"worse": "red", "better": "green", "": ""}


def quality_tables(report: EvalReport) -> list[Table]:
    """For each prompt length the plans' headline measures beside the dense run's, with intervals of the differences."""
    tables = [_quality_table(report, length) for length in sorted({row.length for row in report.summaries})]
    if report.samples < FEW_SAMPLES:
        tables[
            -1
        ].caption = f"{report.samples} samples a task make intervals that are too narrow; take {FEW_SAMPLES} or more"
    return tables


def _quality_table(report: EvalReport, length: int) -> Table:
    table = _table(f"Quality against the dense run, {length:,} tokens, {report.samples} samples a task")
    table.add_column("task, measure", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for heading in ("dense", "pruned", "change", "95 % interval", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    rows = [row for row in report.summaries if row.length == length]
    one_ruler_task = len({row.task for row in rows} & set(report.ruler_tasks)) == 1
    before = ""
    for row in rows:
        if row.metric not in HEADLINE.get(row.task, ("score", "nats")) or (row.task == RULER_MEAN and one_ruler_task):
            continue
        label = f"{row.task}, mean" if row.task in (RULER_MEAN, QUESTIONS) else row.task + UNITS[row.metric]
        # What repeats from the line above is left out, so that the plans of one measure read as a group.
        table.add_row(
            "" if label == before else label,
            Text(row.plan),
            *_figures(row),
            f"{row.worst:+.2f}",
            Text(row.verdict or ("no worse" if row.no_worse else ""), style=STYLES[row.verdict]),
        )
        before = label
    return table


def _figures(row: Summary) -> tuple[str, ...]:
    if row.metric == "kl":  # to the dense run: the value is the difference
        return "", f"{row.mean:.3f}", "", f"{row.low:.3f} .. {row.high:.3f}"
    return f"{row.dense:.3f}", f"{row.mean:.3f}", f"{row.difference:+.3f}", f"{row.low:+.3f} .. {row.high:+.3f}"


def ttft_table(report: EvalReport) -> Table:
    """Time to first token, its ratio to the dense run's, and what the plan kept."""
    table = _table("Time to first token")
    table.add_column("prompt", no_wrap=True)
    table.add_column("plan")
    for heading in ("median", "spread", "faster", "tokens kept", "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in report.timings:
        table.add_row(
            f"{timing.length:,}",
            Text(timing.plan),
            f"{timing.median_s:.2f} s",
            f"{min(timing.ttft_s):.2f} .. {max(timing.ttft_s):.2f} s",
            f"{report.speedup(timing):.2f}x",
            " > ".join(f"{kept:,}" for kept in timing.stages) or "all (dense)",
            f"{timing.kv_bytes / 2**20:.1f} MiB",
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", box=None, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
