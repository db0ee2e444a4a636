"""Which backend computes: the one place that names them all."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from slimrt.errors import SettingError
from slimrt.ops.numpy_ops import NumpyOps

__all__ = ["DEVICES", "Backend", "check_device", "describe_backend", "fast_features", "open_backend", "uses_kernels"]

DEVICES = ("auto", "cpu", "numpy")


@dataclass(frozen=True)
class Backend:
    """An instance of one of the operations' classes, and ``why`` it was chosen, in words for the user."""

    ops: Any
    why: str


def check_device(device: str) -> None:
    """Raise SettingError for a device that is unknown or cannot work here: before anything is read."""
    if device not in DEVICES:
        raise SettingError(
            f"device '{device}': this version computes on the CPU; use 'cpu' or 'auto', or 'numpy' for the slower "
            "backend that is the reference"
        )


def fast_features() -> tuple[Any, str]:
    """What compiled kernels may use on this processor (None: they cannot be used), and why, in words for the user."""
    if importlib.util.find_spec("numba") is None:
        return None, "NumPy: Numba is not installed; run pip install 'slimrt[fast]' for kernels several times as fast"
    try:
        from slimrt.ops.fast.features import detect

        features = detect()
    except Exception as error:  # whatever an installation that does not fit together makes of an import
        line = (str(error).splitlines() or [""])[0]
        return None, f"NumPy: Numba cannot be loaded ({type(error).__name__}: {line}); install it anew"
    if not features.avx2:
        return None, "NumPy: this processor, or what NUMBA_CPU_FEATURES leaves of it, lacks AVX2, FMA or F16C"
    return features, f"kernels compiled by Numba for {features.words}"


def uses_kernels(device: str) -> bool:
    """Whether ``device`` leads to the compiled kernels, which keep weights packed and the cache in float16."""
    return device != "numpy" and fast_features()[0] is not None


def describe_backend(device: str) -> dict[str, str]:
    """What ``open_backend`` would open: its name, and why."""
    if device == "numpy":
        return {"name": "numpy", "why": "NumPy: asked for"}
    features, why = fast_features()
    return {"name": "numpy" if features is None else "fast", "why": why}


def open_backend(device: str, *, threads: int | None = None, packed: bool = False) -> Backend:
    """The backend for ``device``: "cpu" or "auto" for the best that works here, "numpy" for the specification.

    ``threads``: cores to use (None: all). ``packed``: NumPy keeps weights as they lie in the file. Raises SettingError
    for a device that is unknown or does not work here.
    """
    check_device(device)
    if device == "numpy":
        return Backend(NumpyOps(threads, packed=packed), describe_backend(device)["why"])
    features, why = fast_features()
    if features is None:
        return Backend(NumpyOps(threads, packed=packed), why)
    from slimrt.ops.fast.fast_ops import FastOps

    return Backend(FastOps(threads, features=features), why)
