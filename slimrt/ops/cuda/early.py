"""Launches that begin before the kernel ahead of them has ended (programmatic dependent launch, Hopper).

In a chain of short kernels each would wait for the last block of the one before, and then for its own first bytes of
weights. A kernel launched this way starts as soon as there is room, fetches what nobody computes, and waits in
``await_predecessor`` (ptx.cuh) for the rest. CuPy has no word for it, so the driver is asked directly; a captured
graph keeps the order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimrt.errors import DeviceError

__all__ = ["EARLY", "EarlyLaunch"]

# The kernels that wait for the one before them themselves, in every block, before they touch what it computes.
EARLY = frozenset({"gemv", "gemv_gated", "gemv_heads", "attention_decode", "attention_combine"})
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: ``value`` is the first number of a union of 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60),
    ]  # fmt: skip


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class EarlyLaunch:
    """``launch(function, grid, block, args, shared, stream)``. ``driver``: the library, by default CUDA's."""

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver or ctypes.CDLL("libcuda.so.1")

    def __call__(
        self, function: int, grid: Sequence[int], block: int, args: Sequence[Any], shared: int, stream: int
    ) -> None:
        """Queue a CUfunction; ``args``: arrays of the device and NumPy scalars. Raises DeviceError if it is refused."""
        values = [
            ctypes.create_string_buffer(arg.tobytes(), arg.itemsize)
            if isinstance(arg, np.generic)
            else ctypes.c_void_p(arg.data.ptr)
            for arg in args
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = Attribute(id=_SERIALIZATION, value=1)
        sizes = (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid)))
        config = Config(sizes, (ctypes.c_uint * 3)(block, 1, 1), shared, stream, ctypes.pointer(attribute), 1)
        status = self._driver.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), addresses, None)
        if status:
            raise DeviceError(f"an early launch was refused (CUDA error {status}); this is a bug; use device='cpu'")
