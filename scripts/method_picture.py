"""The picture of docs/method.md: the blocks of a prompt that each layer computed, as ``slimrt explain --json`` tells.

    slimrt explain --file FILE --question TEXT --prune PLAN.json --json > report.json
    python scripts/method_picture.py report.json docs/method.svg

Without outside resources; colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, TOP = 760, 9, 64, 26  # pixels: of the blocks, of a layer; margins

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #16181d }
  .in { fill: #1a73e8 } .out { fill: #e3e6eb } .cut { stroke: #b3261e; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eaee } .in { fill: #5a9bff } .out { fill: #2a2e36 } .cut { stroke: #ff8a80 }
  }
"""


def runs(flags: list[bool]) -> list[tuple[int, int, bool]]:
    """Neighbours of one kind together: (first, end, flag)."""
    found: list[tuple[int, int, bool]] = []
    for at, flag in enumerate(flags):
        if found and found[-1][2] == flag:
            found[-1] = (found[-1][0], at + 1, flag)
        else:
            found.append((at, at + 1, flag))
    return found


def picture(report: dict[str, Any]) -> str:
    """One row of the SVG for each layer, one column for each block; a cut is a line below its layer."""
    blocks, cuts, layers = report["blocks"], report["cuts"], report["layers"]
    step, height = WIDTH / len(blocks), ROW * len(layers)
    drawn = []
    for layer in range(len(layers)):
        passed = sum(cut["layer"] < layer for cut in cuts)
        for first, end, inside in runs([block["survived"] >= passed for block in blocks]):
            x, width = LEFT + first * step, (end - first) * step
            kind = "in" if inside else "out"
            drawn.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{TOP + layer * ROW}" width="{width:.1f}" height="{ROW - 1}"/>'
            )
    for cut in cuts:
        y = TOP + (cut["layer"] + 1) * ROW - 0.5
        drawn.append(f'<line class="cut" x1="{LEFT - 6}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        drawn.append(
            f'<text x="{LEFT + WIDTH + 8}" y="{y + 4}">{cut["blocks_after"]} of {len(blocks)} blocks go on</text>'
        )
    for layer in (0, *(cut["layer"] for cut in cuts), len(layers) - 1):
        drawn.append(f'<text x="{LEFT - 10}" y="{TOP + (layer + 1) * ROW}" text-anchor="end">layer {layer}</text>')
    drawn.append(
        f'<text x="{LEFT}" y="16">{report["tokens"]:,} tokens in blocks of {report["block"]}, in their order</text>'
    )
    drawn.append(f'<text x="{LEFT + WIDTH}" y="16" text-anchor="end">the question</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 150} {TOP + height + 8}" role="img">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(drawn) + "\n</svg>\n"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    options.picture.write_text(picture(json.loads(options.report.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
