"""Kernels for one exact architecture: compiled by NVRTC, loaded as the binary that it gives.

CuPy's RawModule compiles for the plain architecture of the device (sm_90). Instructions of ``sm_90a``, wgmma and
setmaxnreg, are refused there.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["CubinModule", "compile_cubin"]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def compile_cubin(code: str, options: Sequence[str]) -> bytes:
    """CUDA source text, headers pasted in, to a cubin; ``options`` hold ``-arch=sm_...``.

    Raises RuntimeError with the compiler's first error, or its log.
    """
    nvrtc = import_module("cupy_backends.cuda.libs.nvrtc")
    program = nvrtc.createProgram(code, "kernel.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, tuple(options))
        except Exception as error:
            raise RuntimeError(nvrtc.getProgramLog(program) or str(error)) from error
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


class CubinModule:
    """What ``Kernels`` uses of ``cupy.RawModule``, for an architecture that RawModule has no word for.

    ``cubin``: a binary that was compiled before, in the place of ``code``.
    """

    def __init__(self, code: str, options: Sequence[str], cubin: bytes | None = None) -> None:
        self._code, self._options, self._cubin = code, tuple(options), cubin
        self._module: Any = None

    def compile(self) -> None:
        """Compile and load it, once. Raises RuntimeError if it does not compile, CuPy's errors if it does not load."""
        if self._module is None:
            cubin = self._cubin or compile_cubin(self._code, self._options)
            self._module = import_module("cupy.cuda.function").Module()
            self._module.load(cubin)

    def get_function(self, name: str) -> CubinKernel:
        """The kernel ``name``; ``compile`` comes first."""
        return CubinKernel(self._module.get_function(name))


class CubinKernel:
    """``kernel(grid, block, args, shared_mem=0)`` on the current stream, as a ``cupy.RawKernel``."""

    def __init__(self, function: Any) -> None:
        self._function, self._allowed = function, 48 << 10

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._allowed

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        driver = import_module("cupy_backends.cuda.api.driver")
        driver.funcSetAttribute(self._function.ptr, _MAX_DYNAMIC_SHARED, nbytes)
        self._allowed = nbytes

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *, shared_mem: int = 0
    ) -> None:
        self._function(grid, block, args, shared_mem=shared_mem)
