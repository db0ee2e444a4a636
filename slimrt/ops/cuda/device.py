"""Whether there is a GPU that can be used, and if not, why not and what helps."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from slimrt.errors import DeviceError

__all__ = ["MIN_CAPABILITY", "CudaDevice", "load_cupy", "probe", "say_why", "wants_gpu"]

MIN_CAPABILITY = (8, 0)  # cp.async and mma.sync m16n8k16 (Ampere)
_PER_THREAD = "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM"
_REMEDY = "or use device='cpu' (--device cpu)"

Result = TypeVar("Result")


@dataclass(frozen=True)
class CudaDevice:
    """A GPU that works. Sizes in bytes, ``free`` when it was looked at; ``driver`` and ``runtime``: 12040 for 12.4."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    multiprocessors: int
    shared_per_block: int
    driver: int
    runtime: int
    cupy: str

    def __str__(self) -> str:
        return (
            f"{self.name} (sm_{self.capability[0]}{self.capability[1]}, {self.free / 2**30:.1f} of "
            f"{self.total / 2**30:.1f} GiB free, CUDA {_version(self.runtime)}, CuPy {self.cupy})"
        )


def load_cupy() -> Any:
    """The package CuPy. Raises DeviceError where it is not installed or cannot be imported."""
    try:
        return import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise DeviceError(
                f"CuPy cannot be imported: {error.name} is missing; install it again with "
                f"pip install 'slimrt[cuda12]' or 'slimrt[cuda13]', {_REMEDY}"
            ) from error
        raise DeviceError(
            "CuPy is not installed; pip install 'slimrt[cuda13]' (driver 580 or newer) or 'slimrt[cuda12]' "
            f"(driver 525 or newer), {_REMEDY}"
        ) from None
    except Exception as error:  # a library of another CUDA version, or a cache folder that cannot be written
        raise DeviceError(
            f"CuPy cannot be imported ({_first_line(error)}); check that one cupy package is installed, that it is for "
            f"the CUDA of this machine, and that CUPY_CACHE_DIR can be written, {_REMEDY}"
        ) from error


def probe() -> CudaDevice:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES decides which that is).

    Raises DeviceError, in one line, if CuPy, the driver, or the GPU is missing, too old, or does not work.
    """
    cupy = load_cupy()
    if os.environ.get(_PER_THREAD, "0") not in ("", "0"):
        # What is done outside a pass would then not be ordered with it.
        raise DeviceError(f"{_PER_THREAD} is set; slimrt computes on the legacy default stream; unset it, {_REMEDY}")
    runtime = cupy.cuda.runtime
    driver = _asked("its driver version", runtime.driverGetVersion)
    built = _asked("its runtime version", runtime.runtimeGetVersion)
    if driver == 0:
        raise DeviceError(f"no NVIDIA driver is installed, or none that this process sees; install one, {_REMEDY}")
    if driver // 1000 < built // 1000:
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {_version(driver)}, this CuPy needs {_version(built)}; update the driver "
            f"or pip install 'slimrt[cuda{driver // 1000}]' in place of {_package(built)}, {_REMEDY}"
        )
    count = _asked("the number of its devices", runtime.getDeviceCount)
    if count == 0:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f"CUDA_VISIBLE_DEVICES={shown!r} shows none; change it" if shown is not None else "plug one in"
        raise DeviceError(f"CUDA finds no GPU; {hint}, {_REMEDY}")
    properties = _asked("the properties of its first device", lambda: runtime.getDeviceProperties(0))
    name = properties["name"].decode(errors="replace")
    capability = (int(properties["major"]), int(properties["minor"]))
    if capability < MIN_CAPABILITY:
        raise DeviceError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere, 2020) or later; use another GPU, {_REMEDY}"
        )
    for library in ("cublas", "nvrtc"):
        try:
            import_module(f"cupy_backends.cuda.libs.{library}")
        except ImportError as error:
            raise DeviceError(
                f"CuPy finds no {library} of CUDA {_version(built)} ({_first_line(error)}); pip install "
                f"'slimrt[cuda{built // 1000}]' brings it, {_REMEDY}"
            ) from error
    free, total = _asked("its free memory", runtime.memGetInfo)  # the first call that needs the device to work
    return CudaDevice(
        name=name,
        capability=capability,
        total=int(total),
        free=int(free),
        multiprocessors=int(properties["multiProcessorCount"]),
        shared_per_block=int(properties["sharedMemPerBlockOptin"]),
        driver=driver,
        runtime=built,
        cupy=cupy.__version__,
    )


def wants_gpu() -> bool:
    """Whether there are signs that a GPU was meant to be used: CuPy is installed, or an NVIDIA driver is loaded."""
    return find_spec("cupy") is not None or Path("/proc/driver/nvidia/version").exists()


def say_why(error: BaseException) -> str:
    """An exception of CuPy or CUDA in one line, with the remedy."""
    text = _first_line(error)
    if isinstance(error, MemoryError) or "cudaErrorMemoryAllocation" in text:
        return (
            f"the GPU's memory does not suffice ({text}); shorten the prompt, lower ctx (--ctx), keep fewer rows "
            f"resident (kv_budget, --kv-budget), {_REMEDY}"
        )
    return (
        f"CUDA failed ({type(error).__name__}: {text}); what was being computed is lost, and after a failed launch "
        f"or copy so is the GPU for this process: start it again, {_REMEDY}"
    )


def _asked(what: str, question: Callable[[], Result]) -> Result:
    try:
        return question()
    except Exception as error:
        text = _first_line(error)
        if "cudaErrorInsufficientDriver" in text or "cudaErrorNoDevice" in text:
            raise DeviceError(
                f"no GPU can be reached ({text}); install or update the NVIDIA driver, {_REMEDY}"
            ) from error
        raise DeviceError(
            f"CUDA does not tell {what} ({type(error).__name__}: {text}); check with nvidia-smi, {_REMEDY}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _package(built: int) -> str:
    return f"cupy-cuda{built // 1000}x"
