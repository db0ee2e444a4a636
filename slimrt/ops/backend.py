"""Which backend computes: the one place that names them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimrt.errors import SettingError
from slimrt.ops.numpy_ops import NumpyOps

__all__ = ["DEVICES", "Backend", "check_device", "open_backend"]

DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class Backend:
    """An instance of one of the operations' classes, and ``why`` it was chosen, in words for the user."""

    ops: Any
    why: str


def check_device(device: str) -> None:
    """Raise SettingError for a device that is unknown or cannot work here: before anything is read."""
    if device not in DEVICES:
        raise SettingError(f"device '{device}': this version computes on the CPU; use 'cpu' or 'auto'")


def open_backend(device: str, *, threads: int | None = None, packed: bool = False) -> Backend:
    """The backend for ``device``: "cpu", or "auto" for the best that works here.

    ``threads``: cores to use (None: all). ``packed``: keep weights as they lie in the file. Raises SettingError for a
    device that is unknown or does not work here.
    """
    check_device(device)
    return Backend(NumpyOps(threads, packed=packed), "NumPy")
