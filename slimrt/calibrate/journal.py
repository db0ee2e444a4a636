"""What was measured so far, in a file: a calibration that was broken off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimrt.prune.plan import PrunePlan

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines: first what the measurements depend on (``header``), then one measurement a line.

    Each header has a file of its own, ``path`` with a digest of the header behind it, so that settings tried in between
    cost nothing that was measured. A line that a killed process left unfinished is dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._known: dict[tuple[str, str], dict[str, float]] = {}
        first = json.dumps(header, sort_keys=True)
        self.path = path = path.with_name(f"{path.name}-{hashlib.sha256(first.encode()).hexdigest()[:12]}")
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if not lines or lines[0] != first:
            lines = [first]
        for line in lines[1:]:
            entry = json.loads(line)
            self._known[entry["sample"], entry["plan"]] = entry["losses"]
        self.resumed = len(self._known)
        path.write_text("".join(line + "\n" for line in lines))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, sample: str, plan: PrunePlan) -> Mapping[str, float] | None:
        """The losses of ``plan`` on ``sample``, None if they were not measured."""
        return self._known.get((sample, _key(plan)))

    def add(self, sample: str, plan: PrunePlan, losses: Mapping[str, float]) -> None:
        """Keep a measurement, in the file too."""
        entry = {"sample": sample, "plan": _key(plan), "losses": dict(losses)}
        self._known[sample, _key(plan)] = dict(losses)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        """Delete the file: the result is written."""
        self.path.unlink(missing_ok=True)


def _key(plan: PrunePlan) -> str:
    return json.dumps(json.loads(plan.to_json()), sort_keys=True)
