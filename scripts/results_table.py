"""The README's table of GPU results, made of the newest ``docs/results/gpu-*.json``; never written by hand.

    python scripts/results_table.py [--readme README.md] [--results FILE ...] [--check]

The table stands between two marker lines (``BEGIN``, ``END`` below); a README without them is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
NOTHING = "No GPU has been measured yet: `make gpu` measures one and fills this table."


def table(results: dict[str, Any] | None) -> str:
    """Markdown: a line a prompt length, the command and the card below it."""
    if results is None:
        return NOTHING
    steps = {name: step["results"] for name, step in results["steps"].items()}
    columns: list[tuple[str, dict[int, float]]] = []
    for step in ("ttft", "ttft_q4"):
        found = steps.get(step, {})
        rows = [row for row in found.get("rows", []) if "error" not in row]
        for plan in dict.fromkeys(row["plan"] for row in rows):
            name = "dense" if plan == "off" else plan
            times = {row["length"]: row["ttft_s"] for row in rows if row["plan"] == plan}
            columns.append((f"{found['type']} {name}", times))
    peer = [row for row in steps.get("peer_ttft", {}).get("rows", []) if "ttft_s" in row]
    if peer:
        columns.append((peer[0]["program"], {row["length"]: row["ttft_s"] for row in peer}))
    lengths = sorted({length for _, times in columns for length in times})
    lines = [
        f"| prompt tokens | {' | '.join(name for name, _ in columns)} |",
        f"|---:|{'---:|' * len(columns)}",
    ]
    for length in lengths:
        cells = [f"{times[length]:.2f}" if length in times else "-" for _, times in columns]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    about = steps.get("device", {}).get("about", "unknown device")
    shape = steps.get("ttft", {}).get("shape", "unknown shape")
    lines += [
        "",
        f"Seconds to the first token, {shape} with random weights. {about}, {results['date'][:10]}; `make gpu`.",
    ]
    unfinished = [name for name, step in results["steps"].items() if step["ended"] != "passed"]
    if unfinished:
        lines.append(f"Steps that did not end well: {', '.join(unfinished)}.")
    return "\n".join(lines)


def updated(readme: str, results: dict[str, Any] | None) -> str | None:
    """``readme`` with the table in its place, or None if it has no place for it."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def newest(folder: Path) -> dict[str, Any] | None:
    """The latest results that are not a dry run's."""
    found = [json.loads(path.read_text()) for path in folder.glob("gpu-*.json")]
    return max((results for results in found if not results["dry"]), key=lambda results: results["date"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, help="a results file, in place of the newest")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the table is not up to date")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results else newest(ROOT / "docs" / "results")
    before = options.readme.read_text()
    after = updated(before, results)
    if after is None:
        sys.exit(f"{options.readme}: has no lines {BEGIN!r} and {END!r}; add them where the table is to stand")
    if options.check:
        sys.exit(
            0 if after == before else f"{options.readme}: its table of GPU results is not the newest; run this script"
        )
    options.readme.write_text(after)


if __name__ == "__main__":
    main()
