"""Which backend computes: the one place that names them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimrt.errors import DeviceError, SettingError
from slimrt.ops.cuda_device import CudaDevice, probe
from slimrt.ops.numpy_ops import NumpyOps

__all__ = ["DEVICES", "Backend", "check_device", "find_gpu", "open_backend", "open_cuda"]

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """An instance of one of the operations' classes, and ``why`` it was chosen, in words for the user."""

    ops: Any
    why: str


def check_device(device: str) -> None:
    """Raise SettingError for a device that is unknown, DeviceError for one that cannot work here: before anything is
    read."""
    if device not in DEVICES:
        raise SettingError(f"device '{device}': must be one of {', '.join(DEVICES)}")
    if device == "cuda":
        probe()


def find_gpu(device: str) -> tuple[CudaDevice | None, str]:
    """The GPU for ``device``, or None where it is "cpu" or ("auto") none works; and why, in one line.

    Raises DeviceError where "cuda" is asked for and does not work.
    """
    if device == "cpu":
        return None, "the CPU was asked for"
    try:
        gpu = probe()
    except DeviceError as error:
        if device == "cuda":
            raise
        return None, str(error)
    return gpu, str(gpu)


def open_cuda(gpu: CudaDevice) -> Backend:
    """The backend on ``gpu``. Raises DeviceError if it does not start."""
    from slimrt.ops.cupy_ops import CupyOps

    return Backend(CupyOps(gpu), str(gpu))


def open_backend(device: str, *, threads: int | None = None, packed: bool = False) -> Backend:
    """The backend for ``device``: "cpu", "cuda", or "auto" for the best that works here.

    ``threads``: cores to use (None: all). ``packed``: keep weights as they lie in the file (on the CPU; a GPU always
    does). Raises SettingError for a device that is unknown, DeviceError for one that does not work here.
    """
    check_device(device)
    gpu, _ = find_gpu(device)
    if gpu is not None:
        return open_cuda(gpu)
    return Backend(NumpyOps(threads, packed=packed), "NumPy")
