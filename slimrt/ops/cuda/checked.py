"""What every wrapper of a kernel checks before it launches."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimrt.errors import DeviceError
from slimrt.ops.cuda.device import CudaDevice
from slimrt.ops.cuda.memory import CupyMemory
from slimrt.ops.cuda.modules import Kernels

__all__ = ["HEAD_WIDTHS", "Checked"]

Array = Any  # of CuPy

HEAD_WIDTHS = (64, 96, 128, 256)  # that the attention kernels are made for


class Checked(CupyMemory):
    """RawKernels know neither strides nor types nor devices: what does not match would be misread, so it is refused by
    a DeviceError."""

    device: CudaDevice
    kernels: Kernels

    @property
    def half_type(self) -> str:
        """The type of activations, keys and values, as the kernels name it."""
        return self.element.name

    def check(self, what: str, x: Array, dtype: Any, shape: tuple[int | None, ...]) -> None:
        """RawKernels know neither strides nor types nor devices: what does not match would be misread."""
        if isinstance(x, np.ndarray):
            raise DeviceError(f"{what}: an array lies in host memory; upload it first; this is a bug")
        if x.device.id != 0:
            raise DeviceError(f"{what}: an array lies on GPU {x.device.id}, this runs on GPU 0; this is a bug")
        if x.dtype != dtype:
            raise DeviceError(f"{what}: an array is {x.dtype}, must be {np.dtype(dtype)}; this is a bug")
        if len(x.shape) != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape, strict=True)):
            raise DeviceError(f"{what}: an array has shape {x.shape}, must have {shape}; this is a bug")
        if not x.flags.c_contiguous:
            raise DeviceError(f"{what}: an array of shape {x.shape} is not C-contiguous; copy it; this is a bug")

    def stride(self, what: str, x: Array) -> int:
        """Elements from one entry of the first axis of x [n, m, Dh] to the next; the rest must be contiguous."""
        if isinstance(x, np.ndarray) or x.device.id != 0 or x.dtype != self.dtype:
            raise DeviceError(f"{what}: an array of {x.dtype} must be {self.dtype} on GPU 0; this is a bug")
        inner = (x.shape[2] * x.itemsize, x.itemsize)
        if any(size > 1 and step != want for size, step, want in zip(x.shape[1:], x.strides[1:], inner, strict=True)):
            raise DeviceError(f"{what}: the rows of an array of shape {x.shape} are not contiguous; this is a bug")
        stride = int(x.strides[0]) // int(x.itemsize) if x.shape[0] > 1 else x.shape[1] * x.shape[2]
        if stride % 8:
            raise DeviceError(f"{what}: a stride of {stride} elements; kernels read 8 at a time; this is a bug")
        return stride

    def check_heads(self, what: str, q: Array, k: Array) -> None:
        tokens, heads, width = q.shape
        kv_heads, keys, other = k.shape
        if width not in HEAD_WIDTHS or width != other:
            raise DeviceError(f"{what}: heads of {width}; the GPU's kernels have {HEAD_WIDTHS}; use device='cpu'")
        if heads % kv_heads or keys < tokens:
            raise DeviceError(f"{what}: {heads} heads on {kv_heads}, {tokens} rows of {keys}; this is a bug")
