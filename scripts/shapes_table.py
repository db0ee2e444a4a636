"""The table of what answers lose, by shape of question, of all reports ``docs/results/shapes-*.json``.

    python -m scripts.shapes_table

Nats of the whole answer, pruned less dense: mean and worst over the reports, whose plans may differ in what no single
prompt notices (``questions``), so that ``slimrt eval --report`` does not show them together. Below it the 95 % interval
of the mean over the facts (``quote`` asks for no fact), by bootstrap as if they were independent.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PLANS = ("auto", "fast")


def losses() -> dict[str, dict[str, np.ndarray]]:
    """Task -> "dense": nats of the dense run [N], each plan: what it loses against that [N, or fewer: not every report
    has every plan]."""
    nats: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("shapes-*.json")):
        results = json.loads(path.read_text())["results"]
        dense = {(one["task"], one["index"]): one["metrics"]["nats"] for one in results if one["plan"] == "dense"}
        for (task, _), value in dense.items():
            nats[task]["dense"].append(value)
        for one in results:
            if one["plan"] in PLANS:
                nats[one["task"]][one["plan"]].append(one["metrics"]["nats"] - dense[one["task"], one["index"]])
    return {task: {name: np.array(values) for name, values in of.items()} for task, of in nats.items()}


def line(name: str, of: dict[str, np.ndarray]) -> str:
    """A row of the table."""
    cells = [f"{of[plan].mean():+.2f}, {of[plan].max():+.2f}" for plan in PLANS]
    return " | ".join([f"| {name}", f"{of['dense'].mean():.2f}", *cells]) + " |"


def main() -> None:
    """The command."""
    found = losses()
    print("| shape | dense | auto: mean, worst | fast: mean, worst |\n|---|---:|---:|---:|")
    for task, of in found.items():
        print(line(f"`{task}`", of))
    facts = {
        name: np.concatenate([of[name] for task, of in found.items() if task != "quote"]) for name in ("dense", *PLANS)
    }
    print(line(f"the {len(facts['dense'])} facts", facts))
    rng = np.random.default_rng(0)
    for plan in PLANS:
        means = rng.choice(facts[plan], (10_000, len(facts[plan]))).mean(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        print(f"{plan}: mean over {len(facts[plan])} facts within {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    main()
