"""What tests cost: processor seconds of each file, children included, told at the end of a run.

Wall time says little on a shared machine. Whoever adds a test sees here what all who come after pay for it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest

TOLD = 10  # files
DEAR_S = 5.0  # a cheaper file is not named

_cpu_before = pytest.StashKey[float]()


def _cpu() -> float:
    """User and system seconds of this process, and of those of its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The clock of a test starts."""
    item.stash[_cpu_before] = _cpu()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What passed since the last report of this test goes with this one, from a worker too."""
    report = yield
    now = _cpu()
    report.user_properties = [*report.user_properties, ("cpu_s", now - item.stash[_cpu_before])]  # type: ignore[attr-defined]
    item.stash[_cpu_before] = now
    return report


class Costs:
    """Adds up, where reports arrive, what each file took."""

    def __init__(self) -> None:
        self.files: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each test has three: set-up, call, teardown. Only the last entry is this report's; one of a worker that died
        has none."""
        self.files[report.location[0]] += dict(report.user_properties).get("cpu_s", 0)  # type: ignore[operator]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The dearest files; set ``SLIMRT_COSTS`` to see all."""
        found = sorted(self.files.items(), key=lambda item: -item[1])
        shown = found if os.environ.get("SLIMRT_COSTS") else [row for row in found if row[1] >= DEAR_S][:TOLD]
        if shown:
            terminalreporter.write_line(f"processor seconds: {sum(self.files.values()):.0f}, of which")
        for name, seconds in shown:
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")


def pytest_configure(config: pytest.Config) -> None:
    """One book, in the process that reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Costs(), "costs")
