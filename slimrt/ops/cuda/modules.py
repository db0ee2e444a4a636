"""CUDA sources to modules, once each, and one way to launch what they export.

CuPy's cache of compiled kernels knows a source by its text and options, not by the files it includes: a changed header
would go unnoticed. So headers are pasted in, and the text is the whole truth. ``#line`` keeps the compiler's messages
at the right place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from slimrt.errors import DeviceError
from slimrt.ops.cuda.cubin import CubinModule

__all__ = ["ARCHITECTURES", "Kernels", "source_text"]

ARCHITECTURES = {"attention_wgmma": "sm_90a"}  # sources that compile for one architecture only

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w./]+)"\s*$')
_PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")


@cache
def source_text(name: str) -> str:
    """The source ``name`` of ``kernels_cu`` with every header pasted in where it is included first."""
    seen: set[str] = set()

    def paste(file: str) -> list[str]:
        seen.add(file)
        lines = [f'#line 1 "{file}"']
        for number, line in enumerate((resources.files("slimrt.kernels_cu") / file).read_text().splitlines(), 1):
            include = _INCLUDE.match(line)
            if include is None:
                lines.append("" if _PRAGMA_ONCE.match(line) else line)
            elif include[1] in seen:
                lines.append("")
            else:
                lines += [*paste(include[1]), f'#line {number + 1} "{file}"']
        return lines

    return "\n".join(paste(name)) + "\n"


class Kernels:
    """The kernels of one device, compiled when first used. ``cupy``: the package."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._kernels: dict[tuple[str, str, tuple[str, ...]], Any] = {}
        self._allowed: dict[int, int] = {}  # by kernel: bytes of shared memory that were allowed

    def get(self, source: str, name: str, **macros: object) -> Any:
        """The kernel ``name`` of ``source`` (without ``.cu``) under ``macros``.

        Raises DeviceError where it does not compile.
        """
        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in sorted(macros.items())))
        kernel = self._kernels.get((source, name, options))
        if kernel is None:
            module = self._modules.get((source, options))
            if module is None:
                code, architecture = source_text(f"{source}.cu"), ARCHITECTURES.get(source)
                if architecture is None:
                    module = self._cupy.RawModule(code=code, options=options)
                else:
                    module = CubinModule(code, (*options, f"-arch={architecture}"))
                self._modules[source, options] = module
            try:
                module.compile()
                kernel = module.get_function(name)
            except Exception as error:
                first = next((line for line in str(error).splitlines() if "error" in line), f"{error}".split("\n")[0])
                raise DeviceError(
                    f"kernel {name} of {source}.cu ({' '.join(options[1:])}) does not compile: {first.strip()}; "
                    "install a CuPy whose NVRTC is of CUDA 12 or 13, or use device='cpu'"
                ) from error
            self._kernels[source, name, options] = kernel
        return kernel

    def launch(
        self,
        source: str,
        name: str,
        grid: Sequence[int],
        block: int,
        *args: Any,
        shared: int = 0,
        **macros: object,
    ) -> None:
        """Queue a kernel on the current stream.

        ``args``: arrays of the device; int becomes int32, float float32, None a null pointer. ``shared``: bytes of
        dynamic shared memory. A grid with an empty side launches nothing: there is nothing to compute.
        """
        if 0 in grid:
            return
        kernel = self.get(source, name, **macros)
        # Without permission it is 48 KiB, less what the kernel declares: so it is asked for whatever the size.
        if shared > self._allowed.get(id(kernel), 0):
            kernel.max_dynamic_shared_size_bytes = shared
            self._allowed[id(kernel)] = shared
        kernel(tuple(grid), (block,), tuple(_typed(arg) for arg in args), shared_mem=shared)


def _typed(arg: Any) -> Any:
    """CuPy passes Python numbers as 64 bits, whatever the kernel expects."""
    if arg is None:
        return np.uintp(0)
    if isinstance(arg, int):
        return np.int32(arg)
    if isinstance(arg, float):
        return np.float32(arg)
    return arg
