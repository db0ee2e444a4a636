"""Presets of a model from reports of ``slimrt eval``, for plans that were found otherwise than by ``slimrt calibrate``.

What a report measured goes into the file beside the plan.

    python scripts/presets_from_eval.py MODEL.gguf OUT.slim.json auto=REPORT.json:PLAN fast=REPORT.json:PLAN
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from slimrt.models import read_config
from slimrt.prune.plan import PrunePlan
from slimrt.prune.presets import fingerprint
from slimrt.weights.gguf import GGUFFile


def measured(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Losses of a plan against the dense run, positive where it is worse, and times to the first token."""

    def values(plan: str, task: str, metric: str) -> list[float]:
        return [r["metrics"][metric] for r in report["results"] if (r["plan"], r["task"]) == (plan, task)]

    recall, continuation = (values(name, task, "kl") for task in ("recall", "continuation"))
    lengths = sorted({timing["length"] for timing in report["ttft"]})
    seconds = {timing["plan"]: timing["ttft_s"] for timing in report["ttft"] if timing["length"] == lengths[-1]}
    return {
        "measured": {
            "samples": len(recall) + len(continuation),
            "lengths": lengths,
            "kl": mean([*recall, *continuation]),
            "recall_drop": mean(values("dense", "recall", "accuracy")) - mean(values(name, "recall", "accuracy")),
            "nll_rise": mean(values(name, "continuation", "nll")) - mean(values("dense", "continuation", "nll")),
        },
        "ttft_s": {"dense": seconds["dense"], "plan": seconds[name]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("presets", nargs="+", metavar="PRESET=REPORT.json:PLAN")
    options = parser.parse_args()
    presets, sources = {}, {}
    for preset, _, place in (entry.partition("=") for entry in options.presets):
        path, _, name = place.rpartition(":")
        report = json.loads(Path(path).read_text())
        plan = report["plans"][name]["plan"]
        PrunePlan.from_dict(plan)  # refuses what is no plan
        presets[preset] = {"plan": plan, **measured(report, name)}
        text = {**report["text"], "name": Path(report["text"]["name"]).name}
        sources[preset] = {"by": "slimrt eval", "version": report["slimrt"], "seed": report["seed"], "text": text}
    file = GGUFFile(options.model)
    model = fingerprint(file, read_config(file))
    found = {"model": model, "presets": presets, "calibration": sources}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
