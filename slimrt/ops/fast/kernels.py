"""From a Python function to the address of a compiled kernel, kept on disk.

Numba's own cache of a function looks at nothing but that function's file, so a helper that changed in another file would
be served stale. Here the folder is named after the contents of the whole package, the versions of Numba and Python
are in Numba's own key, as are the processor's name and features.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
from numba import njit, types
from numba.core import caching
from numba.core.ccallback import CFunc

__all__ = ["KERNEL", "Kernel", "compile_kernel", "inline"]

KERNEL = types.void(types.int64, types.int64, types.int64)  # (item, thread, args)
_OPTIONS = {"nopython": True, "error_model": "numpy", "boundscheck": False}

inline = njit(error_model="numpy", boundscheck=False, inline="never")
"""A function that kernels call; LLVM puts it in line where that pays."""


class Kernel:
    """A compiled kernel; ``address`` is what a team's program names. Made by ``compile_kernel``."""

    def __init__(self, function: CFunc) -> None:
        self._function = function  # owns the machine code
        self.address: int = function.address


def compile_kernel(function: Callable[..., Any], key: str, signature: Any = KERNEL) -> Kernel:
    """Compile ``function``, or load it from the cache.

    ``key`` names what the function's closure holds (features, types, widths): kernels of one function and different
    closures must have different keys.
    """
    compiled = CFunc(function, (signature.args, signature.return_type), {}, dict(_OPTIONS))
    compiled._cache = _KernelCache(function, key)
    compiled.compile()
    return Kernel(compiled)


@cache
def package_digest() -> str:
    """SHA-256 (hex) of this package's sources: what decides whether a cached kernel is still the right one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where this version of the package keeps its kernels."""
    return Path(platformdirs.user_cache_dir("slimrt", appauthor=False)) / "kernels" / package_digest()


class _Locator:
    """Where one kernel is kept: what Numba's cache asks of a locator."""

    def __init__(self, key: str) -> None:
        self._key = key

    def ensure_cache_path(self) -> None:
        cache_folder().mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return package_digest()

    def get_disambiguator(self) -> str:
        return self._key


class _CacheImpl(caching.CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any], key: str) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(key)
        name = f"{function.__module__}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, "")


class _KernelCache(caching.FunctionCache):
    """Numba's cache of compiled functions, in our folder and under our key; a folder that cannot be used is named once."""

    def __init__(self, function: Callable[..., Any], key: str) -> None:
        self._key = key
        self._impl_class = lambda function: _CacheImpl(function, key)
        super().__init__(function)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), self._key

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # whatever a damaged file makes of unpickling
            _complain(error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _complain(error)


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _complain(error: Exception) -> None:
    _warn_once(
        f"{cache_folder()}: compiled kernels cannot be kept here ({type(error).__name__}: {error}), so every start "
        "compiles them; make the folder writable or remove it"
    )
