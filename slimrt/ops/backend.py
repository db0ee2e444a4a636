"""Which backend computes: the one place that names them all."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from slimrt.errors import DeviceError, SettingError
from slimrt.ops.cuda.device import CudaDevice, probe
from slimrt.ops.cuda.element import ElementName
from slimrt.ops.cuda.prefill import prefill_kernel
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.ops.protocol import Ops

__all__ = [
    "DEVICES",
    "Backend",
    "check_device",
    "describe_backend",
    "fast_features",
    "find_gpu",
    "open_backend",
    "open_cuda",
    "uses_kernels",
]

DEVICES = ("auto", "cuda", "cpu", "numpy")


@dataclass(frozen=True)
class Backend:
    """An instance of one of the operations' classes, and ``why`` it was chosen, in words for the user."""

    ops: Ops
    why: str


def check_device(device: str) -> None:
    """Raise SettingError for a device that is unknown, DeviceError for one that cannot work here: before anything is
    read."""
    if device not in DEVICES:
        raise SettingError(f"device '{device}': must be one of {', '.join(DEVICES)}")
    if device == "cuda":
        probe()


def find_gpu(device: str) -> tuple[CudaDevice | None, str]:
    """The GPU for ``device``, or None where that is the CPU or ("auto") none works; and why, in one line.

    Raises DeviceError where "cuda" is asked for and does not work.
    """
    if device in ("cpu", "numpy"):
        return None, "the CPU was asked for"
    try:
        gpu = probe()
    except DeviceError as error:
        if device == "cuda":
            raise
        return None, str(error)
    return gpu, str(gpu)


def open_cuda(gpu: CudaDevice, *, keeps_unpacked: bool = False, element: ElementName = "f16") -> Backend:
    """The backend on ``gpu``; ``keeps_unpacked``: copies of packed weights in 16 bits stay for the next prompt.
    ``element``: of activations, keys and values.

    Raises DeviceError if it does not start.
    """
    from slimrt.ops.cuda.cupy_ops import CupyOps

    ops = CupyOps(gpu, element=element)
    ops.keeps_unpacked = keeps_unpacked
    return Backend(ops, str(gpu))


def fast_features() -> tuple[Any, str]:
    """What compiled kernels may use on this processor (None: they cannot be used), and why, in words for the user."""
    if importlib.util.find_spec("numba") is None:
        return None, "NumPy: Numba is not installed; run pip install 'slimrt[fast]' for kernels several times as fast"
    try:
        from slimrt.ops.fast.features import detect

        features = detect()
    except Exception as error:  # whatever an installation that does not fit together makes of an import
        line = (str(error).splitlines() or [""])[0]
        return None, f"NumPy: Numba cannot be loaded ({type(error).__name__}: {line}); install it again"
    if not features.avx2:
        return None, "NumPy: this processor, or what NUMBA_CPU_FEATURES leaves of it, lacks AVX2, FMA or F16C"
    return features, f"kernels compiled by Numba for {features.words}"


def uses_kernels(device: str) -> bool:
    """Whether ``device`` leads to the CPU's compiled kernels, which keep weights packed and the cache in float16."""
    return device != "numpy" and find_gpu(device)[0] is None and fast_features()[0] is not None


def describe_backend(device: str, head_dim: int = 128) -> dict[str, str]:
    """What ``open_backend`` would open for a model with such heads: its name, and why.

    Raises DeviceError for "cuda" where that does not work."""
    gpu, _ = find_gpu(device)
    if gpu is not None:
        return {"name": "cuda", "why": f"{gpu}; prompts attend by {prefill_kernel(gpu, head_dim).words}"}
    if device == "numpy":
        return {"name": "numpy", "why": "NumPy: asked for"}
    features, why = fast_features()
    return {"name": "numpy" if features is None else "fast", "why": why}


def open_backend(device: str, *, threads: int | None = None, packed: bool = False) -> Backend:
    """The backend for ``device``: "cuda", "cpu" for the best that works on it, "numpy" for the specification, or
    "auto".

    ``threads``: cores to use (None: all). ``packed``: NumPy keeps weights as they lie in the file. Raises SettingError
    for a device that is unknown, DeviceError for one that does not work here.
    """
    check_device(device)
    gpu, _ = find_gpu(device)
    if gpu is not None:
        return open_cuda(gpu)
    if device == "numpy":
        return Backend(NumpyOps(threads, packed=packed), describe_backend(device)["why"])
    features, why = fast_features()
    if features is None:
        return Backend(NumpyOps(threads, packed=packed), why)
    from slimrt.ops.fast.fast_ops import FastOps

    return Backend(FastOps(threads, features=features), why)
