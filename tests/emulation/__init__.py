"""Runs CUDA kernels of ``kernels_cu`` on the CPU, their source unchanged: compiled by g++ behind ``emulation.h``.

    kernel = emulated("rmsnorm.cu", {"T": "f16"}).kernel("rmsnorm")
    with emulation_mode(deferred=False, seed=7):
        kernel((tokens,), (256,), (x, gain, out, np.int32(width), np.float32(eps)))

A kernel is called as a ``cupy.RawKernel`` is, with NumPy arrays (views with an offset too) in the place of CuPy's. It
is stricter: the number of arguments and the size of each are compared with the signature, more than 48 KiB of dynamic
shared memory must have been allowed, and barriers or warp operations that not all threads reach are an error.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from slimrt.ops.cuda.modules import source_text

__all__ = ["EmulationError", "Kernel", "Module", "compiled", "compiler", "emulated", "emulation_mode"]

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels_cu"
HEADER = Path(__file__).with_name("emulation.h")
RUNTIME = HEADER.with_name("runtime.cpp")
FLAGS = ("-std=c++17", "-fPIC", "-w", "-fno-strict-aliasing")
CACHE = ROOT / "build" / "emulation"  # `make clean` empties it
EXPORTED = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(')
SHARED_LIMIT = 48 << 10  # shared memory that a kernel may have without asking


class EmulationError(RuntimeError):
    """A launch that a GPU would refuse, or under which it would hang or compute garbage."""


@dataclass(frozen=True)
class Mode:
    """``deferred``: cp.async lands when it is waited for, else at once. ``seed``: of the order in which warps run."""

    deferred: bool = True
    seed: int = 0


_mode = Mode()


@contextmanager
def emulation_mode(*, deferred: bool = True, seed: int = 0) -> Iterator[None]:
    """Every launch within runs in this mode."""
    global _mode
    outer, _mode = _mode, Mode(deferred, seed)
    try:
        yield
    finally:
        _mode = outer


def compiler() -> str | None:
    """g++ on Linux, or None: then nothing can be emulated, and tests that want it skip."""
    return shutil.which("g++") if sys.platform == "linux" else None


def emulated(source: str, defines: Mapping[str, object] | None = None) -> Module:
    """The kernels of ``kernels_cu/source``, compiled with ``-DNAME=VALUE`` for each of ``defines``."""
    return compiled(source_text(source), defines)  # the text that the backend compiles: one library serves both


def compiled(code: str, defines: Mapping[str, object] | None = None) -> Module:
    """The kernels of CUDA source text; it may include the headers of ``kernels_cu`` or have them pasted in."""
    return _compiled(code, tuple(sorted((name, str(value)) for name, value in (defines or {}).items())))


@functools.cache
def _contracted() -> tuple[str, ...]:
    """NVRTC joins a product and a sum to one rounded operation (-fmad=true), as g++ does where the processor can."""
    flags = Path("/proc/cpuinfo").read_text().split()
    halves = ["-mf16c"] if "f16c" in flags else []  # float16 is converted by the processor, to the same numbers
    if "fma" in flags:
        return ("-mfma", "-ffp-contract=fast", "-fexpensive-optimizations", *halves)
    return ("-ffp-contract=off", *halves)


@functools.cache
def _compiled(code: str, defines: tuple[tuple[str, str], ...]) -> Module:
    names = EXPORTED.findall(code)
    # Those of the emulation itself are for its headers and runtime too.
    ours = [f"-D{name}={value}" for name, value in defines if name.startswith("EMULATION_")]
    runtime = _runtime(*ours)
    # -O1: most sources run for milliseconds and are compiled for longer.
    flags = [*FLAGS, "-O1", *_contracted(), *ours]
    if _asan():
        # -O0: g++ takes a third less, and the sums that it does not contract then are compared in the run without.
        flags += ["-g1", "-fsanitize=address,alignment", "-O0"]
    elif any(name == "EMULATION_ALIGNMENT" for name, _ in defines):  # a third of the compiler's time
        flags.append("-fsanitize=alignment")
    # Headers that include nothing, and no library but the runtime: of a small kernel g++ makes a library in a third of
    # the time.
    flags += ["-shared", "-nostdlib", "-Wl,-rpath,$ORIGIN"]
    macros = "".join(f"#define {name} {value}\n" for name, value in defines if not name.startswith("EMULATION_"))
    code = f"{macros}#line 1\n{code}\n" + "".join(f"EXPORT_KERNEL({name})\n" for name in names)
    key = _digest(code, *flags, *map(Path.read_text, _headers()))
    sources = [f"-I{SOURCES}", "-include", str(HEADER), "-x", "c++", "-", "-x", "none", str(runtime)]
    library = _made(f"{key}.so", [*flags, *sources], code)
    return Module(ctypes.CDLL(str(library)), names)


@functools.cache
def _runtime(*ours: str) -> Path:
    """The emulation's own library, for all sources that are compiled with its macros ``ours``."""
    ours = tuple(flag for flag in ours if "ALIGNMENT" not in flag)
    flags = [*FLAGS, *_contracted(), *ours, *(["-g1", "-O1", "-fsanitize=address"] if _asan() else ["-O3"])]
    name = f"runtime-{_digest(*flags, *map(Path.read_text, _headers()))}.so"
    return _made(name, [*flags, "-shared", f"-Wl,-soname,{name}", str(RUNTIME)], "")


def _asan() -> bool:
    """Whether the process was started with libasan preloaded, for kernels to be compiled for it."""
    return bool(os.environ.get("SLIMRT_EMULATION_ASAN"))


@functools.cache
def _headers() -> list[Path]:
    return [*sorted(HEADER.parent.glob("*.h")), RUNTIME, *sorted(SOURCES.glob("*.cuh"))]


def _made(name: str, arguments: Sequence[str], code: str) -> Path:
    """The library ``name`` of the cache, made by g++ unless another process has made it, or is making it. The name is
    of contents alone, not of where they lie: another checkout may use the same cache."""
    target = CACHE / name
    if target.exists():
        return target
    gxx = compiler()
    if gxx is None:
        raise EmulationError("emulation needs g++ on Linux; install it")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            _run_compiler([gxx, *(["-fuse-ld=gold"] if shutil.which("ld.gold") else []), *arguments], target, code)
    return target


def _run_compiler(command: list[str], target: Path, code: str) -> None:
    fresh = target.with_suffix(f".{os.getpid()}{target.suffix}")  # renamed when complete
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not into the compiler
    done = subprocess.run([*command, "-o", str(fresh)], input=code, capture_output=True, text=True, env=plain)
    if done.returncode:
        raise EmulationError(f"g++ refused the source ({' '.join(command[1:])}):\n{done.stderr}")
    fresh.replace(target)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join([platform.machine(), *texts]).encode()).hexdigest()[:24]


class Module:
    """A compiled source; its kernels by name."""

    def __init__(self, library: ctypes.CDLL, names: Sequence[str]) -> None:
        self._library, self.names = library, tuple(names)

    def kernel(self, name: str) -> Kernel:
        if name not in self.names:
            raise EmulationError(f"no kernel '{name}' here; there are {', '.join(self.names)}")
        return Kernel(self._library, name)

    get_function = kernel  # as cupy.RawModule calls it


class Kernel:
    """``kernel(grid, block, args, shared_mem=0)`` runs it and returns when it is done."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        # What its source declares (all of its kernels together) counts as well.
        self.name = name
        self.max_dynamic_shared_size_bytes = SHARED_LIMIT - int(getattr(library, f"static_shared_{name}")())
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        signature = getattr(library, f"signature_{name}")
        signature.restype = ctypes.POINTER(ctypes.c_int)
        sizes = signature()
        self._sizes = [sizes[i] for i in range(1, 1 + sizes[0])]

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        if len(args) != len(self._sizes):
            raise EmulationError(f"{self.name}: {len(args)} arguments given, it takes {len(self._sizes)}")
        if not 0 <= shared_mem <= self.max_dynamic_shared_size_bytes:
            raise EmulationError(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory; "
                f"{self.max_dynamic_shared_size_bytes} are allowed (max_dynamic_shared_size_bytes)"
            )
        grid, block = (tuple(int(n) for n in (*sizes, 1, 1)[:3]) for sizes in (grid, block))
        if min(*grid, *block) < 1 or max(grid[1:]) > 65535 or np.prod(block) > 1024:
            raise EmulationError(f"{self.name}: a GPU cannot launch grid {grid} of blocks {block}")
        values = [
            self._value(number, arg, size) for number, (arg, size) in enumerate(zip(args, self._sizes, strict=True))
        ]
        addresses = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        error = self._launch(
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared_mem),
            int(_mode.deferred),
            ctypes.c_uint(_mode.seed),
            addresses,
        )
        if error:
            raise EmulationError(f"{self.name}: {error.decode()}")

    def _value(self, number: int, arg: Any, size: int) -> Any:
        """The argument as the C value of ``size`` bytes, negative for a pointer, that the kernel gets."""
        if size < 0 and hasattr(arg, "ctypes"):  # an array
            return ctypes.c_void_p(arg.ctypes.data)
        if not isinstance(arg, np.generic) or arg.itemsize != abs(size):
            kind = f"{arg.dtype} scalar" if isinstance(arg, np.generic) else type(arg).__name__
            wants = "an array, or numpy.uintp(0) for null" if size < 0 else f"a NumPy scalar of {size} bytes"
            raise EmulationError(f"{self.name}: argument {number} is a {kind}; it takes {wants}")
        return (ctypes.c_char * arg.itemsize).from_buffer_copy(arg.tobytes())
