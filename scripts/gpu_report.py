"""The report of the GPU's steps: a JSON file that is whole at any time, and to which later runs add."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.gpu_layout import ROOT

__all__ = ["Report"]

_TOOL_SECONDS = 30


class Report:
    """What ``--out`` holds: written after each change, merged into what an earlier run left there."""

    def __init__(self, out: Path | None, *, dry: bool) -> None:
        """Raises SystemExit, in one line, if ``out`` is not such a report or cannot be written."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.path = out or _usual_place(now, dry=dry)
        self.results: dict[str, Any] = {"date": now, "dry": dry, "steps": {}}
        if self.path.exists():
            self.results["steps"] = self._earlier(dry=dry)
        self._write()

    def _earlier(self, *, dry: bool) -> dict[str, Any]:
        why = "is not a report of scripts/gpu.py"
        if not self.path.is_file():
            raise SystemExit(f"--out {self.path}: is not a file; name another one")
        try:
            found = json.loads(self.path.read_text())
        except OSError as error:
            raise SystemExit(f"--out {self.path}: cannot be read ({error.strerror}); name another file") from error
        except ValueError as error:
            raise SystemExit(f"--out {self.path}: {why} ({error}); move it away or name another file") from error
        steps = found.get("steps") if isinstance(found, dict) else None
        if not isinstance(steps, dict) or not all(
            isinstance(step, dict) and "ended" in step for step in steps.values()
        ):
            raise SystemExit(f"--out {self.path}: {why}; move it away or name another file")
        if steps and found.get("dry") != dry:
            kinds = ("a card's results", "a dry run's") if dry else ("a dry run's results", "a card's")
            raise SystemExit(
                f"--out {self.path}: holds {kinds[0]}, to which {kinds[1]} cannot be added; name another file"
            )
        return steps

    def put(self, name: str, step: Mapping[str, Any]) -> None:
        """What is known of a step. One that has only begun leaves what an earlier run has found of it."""
        if step["results"] or step["ended"] != "cut off" or name not in self.results["steps"]:
            self.results["steps"][name] = dict(step)
            self._write()

    def _write(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.results, indent=1) + "\n")
            part.replace(self.path)
        except OSError as error:
            raise SystemExit(f"--out {self.path}: cannot be written ({error.strerror}); name another file") from error


def _usual_place(now: str, *, dry: bool) -> Path:
    if dry:
        return ROOT / "build" / "gpu-dry.json"
    card = _card()
    if card is None:
        return ROOT / "build" / "gpu-no-card.json"
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return ROOT / "docs" / "results" / f"gpu-{slug}-{now[:10]}.json"


def _card() -> str | None:
    """The first card's name, None where none is shown. Asked of the driver's tool: this process leaves CUDA alone."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # it hangs where the card is lost
        return None
    return asked.stdout.splitlines()[0] if asked.returncode == 0 and asked.stdout else None
