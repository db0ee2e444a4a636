"""The tables of a GPU's results, of what ``make gpu`` left."""

from __future__ import annotations

from typing import Any

__all__ = ["NOTHING", "gpu_table"]

NOTHING = "No GPU has been measured yet: `make gpu` measures one and fills this table."

_SHOWN = {"8k/4k/2k": "pruned"}  # of the plans that are measured, what the README shows


def gpu_table(results: dict[str, Any] | None, *, details: bool = False) -> str:
    """Markdown: seconds to the first token and tokens a second, a line a prompt length; the card below it. ``details``:
    all plans, weight types and budgets."""
    if results is None:
        return NOTHING
    steps = {name: step["results"] for name, step in results["steps"].items()}
    blocks = [_first_tokens(steps, details), _tokens_a_second(steps, details)]
    about = steps.get("device", {}).get("about", "unknown device")
    shape = steps.get("ttft", {}).get("shape", "unknown shape")
    peer = next((row["program"] for row in steps.get("peers", {}).get("rows", []) if "program" in row), None)
    lines = ["\n\n".join(block for block in blocks if block), ""]
    lines.append(
        f"{shape} with random weights, medians; pruned: behind layers 10, 20, 30 go on 8k, 4k, 2k tokens. "
        f"{about}, {results['date'][:10]}; `make gpu`{f'; {peer}' if peer else ''}."
    )
    unfinished = [name for name, step in results["steps"].items() if step["ended"] not in ("passed", "skipped")]
    if unfinished:
        lines.append(f"Steps that did not end well: {', '.join(unfinished)}.")
    return "\n".join(lines)


def _first_tokens(steps: dict[str, Any], details: bool) -> str:
    """Seconds to the first token: dense, each plan with its gain over dense, and the peer."""
    columns: list[tuple[str, dict[int, str]]] = []
    for step in ("ttft", "ttft_q4") if details else ("ttft",):
        found = steps.get(step, {})
        rows = [row for row in found.get("rows", []) if "error" not in row]
        dense = {row["length"]: row["ttft_s"] for row in rows if row["plan"] == "off"}
        for plan in dict.fromkeys(row["plan"] for row in rows):
            if not details and plan != "off" and plan not in _SHOWN:
                continue
            cells = {}
            for row in (row for row in rows if row["plan"] == plan):
                gain = dense.get(row["length"], 0.0) / row["ttft_s"]
                cells[row["length"]] = f"{row['ttft_s']:.2f} s" + ("" if plan == "off" else f" ({gain:.1f}x)")
            name = "dense" if plan == "off" else plan if details else _SHOWN[plan]
            columns.append((f"{found['type']} {name}", cells))
    peer = [row for row in steps.get("peers", {}).get("rows", []) if "ttft_s" in row]
    if peer:
        columns.append(("Transformers", {row["length"]: f"{row['ttft_s']:.2f} s" for row in peer}))
    return _columns("prompt, first token", columns)


def _tokens_a_second(steps: dict[str, Any], details: bool) -> str:
    """Tokens a second behind a context; in brackets the time over that of reading weights and keys once."""
    columns: list[tuple[str, dict[int, str]]] = []
    rows = [row for row in steps.get("decode", {}).get("rows", []) if "error" not in row]
    for kind, budget in dict.fromkeys((row["type"], row["kv_budget"]) for row in rows):
        if budget is not None and not details:
            continue
        cells = {
            row["length"]: f"{row['decode_tok_s']:.0f} ({row['over_floor']:.1f}x)"
            for row in rows
            if (row["type"], row["kv_budget"]) == (kind, budget)
        }
        columns.append((f"{kind}{'' if budget is None else f', KV budget {budget}'}", cells))
    peer = [row for row in steps.get("peers", {}).get("rows", []) if "decode_tok_s" in row]
    if peer:
        columns.append(("Transformers", {row["length"]: f"{row['decode_tok_s']:.0f}" for row in peer}))
    return _columns("context, tokens/s (over floor)", columns)


def _columns(what: str, columns: list[tuple[str, dict[int, str]]]) -> str:
    lengths = sorted({length for _, cells in columns for length in cells})
    if not lengths:
        return ""
    lines = [f"| {what} | {' | '.join(name for name, _ in columns)} |", f"|---:|{'---:|' * len(columns)}"]
    lines += [f"| {length:,} | {' | '.join(cells.get(length, '-') for _, cells in columns)} |" for length in lengths]
    return "\n".join(lines)
