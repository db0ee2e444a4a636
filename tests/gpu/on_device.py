"""A pytest plugin (``-p tests.gpu.on_device``) by which the kernel tests launch on the GPU and not in the emulation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from scripts import gpu_layout

gpu_layout.install()  # here too: pytest's workers are processes of their own

from slimrt.ops.cuda.cubin import CubinModule  # noqa: E402
from slimrt.ops.cuda.device import load_cupy, probe  # noqa: E402
from slimrt.ops.cuda.modules import ARCHITECTURES, source_text  # noqa: E402
from tests import emulation  # noqa: E402

if emulation.compiler() is None:
    emulation.compiler = lambda: "NVRTC"  # which compiles here: no test must be skipped for want of g++

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


class DeviceModule:
    """The kernels of CUDA source text, compiled by NVRTC, called as those of ``tests.emulation`` are."""

    def __init__(self, code: str, defines: Mapping[str, object] | None, architecture: str | None = None) -> None:
        options = ("-std=c++17", *(f"-D{name}={value}" for name, value in (defines or {}).items()))
        self._module: Any
        if architecture is None:
            self._module = load_cupy().RawModule(code=code, options=options)
        else:
            self._module = CubinModule(code, (*options, f"-arch={architecture}"))
        self._module.compile()

    def kernel(self, name: str) -> DeviceKernel:
        return DeviceKernel(self._module.get_function(name))


class DeviceKernel:
    """NumPy arrays go to the device before a launch and come back after it, whole buffers, so that views stay views."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.max_dynamic_shared_size_bytes = 48 << 10

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        cupy = load_cupy()
        if shared_mem:
            self._kernel.max_dynamic_shared_size_bytes = shared_mem
        buffers: dict[int, tuple[np.ndarray, Any]] = {}
        passed = []
        for arg in args:
            if not isinstance(arg, np.ndarray):
                passed.append(arg)
                continue
            root = arg
            while isinstance(root.base, np.ndarray):
                root = root.base
            flat = root.reshape(-1, order="A").view(np.uint8)
            if id(root) not in buffers:
                buffers[id(root)] = flat, cupy.asarray(flat)
            offset = arg.ctypes.data - flat.ctypes.data
            passed.append(buffers[id(root)][1][offset:])
        self._kernel(tuple(grid), tuple(block), tuple(passed), shared_mem=shared_mem)
        for flat, device in buffers.values():
            if flat.flags.writeable:
                flat[...] = device.get()


def emulated(source: str, defines: Mapping[str, object] | None = None) -> DeviceModule:
    """``tests.emulation.emulated`` on the device."""
    return DeviceModule(source_text(source), defines, ARCHITECTURES.get(source.removesuffix(".cu")))


def compiled(code: str, defines: Mapping[str, object] | None = None) -> DeviceModule:
    """``tests.emulation.compiled`` on the device; headers are pasted in."""
    return DeviceModule(pasted(code), defines)


def pasted(code: str) -> str:
    """``code`` with the headers of ``kernels_cu`` in the place of their includes."""
    return _INCLUDE.sub(lambda found: source_text(found[1]), code)


@pytest.fixture(autouse=True)
def _on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.kernel_cases.emulated", emulated)
    monkeypatch.setattr("tests.gpu.test_ptx.compiled", compiled)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Addresses of host memory mean nothing to a device, and the emulation's modes are one mode there."""
    for item in items:
        if "blocks_and_slots" in item.name:
            item.add_marker(pytest.mark.skip(reason="passes addresses of the host's memory"))
        elif "eager" in item.name:
            item.add_marker(pytest.mark.skip(reason="a mode of the emulation"))


def pytest_report_header() -> str:
    return f"kernels run on {probe()}"
