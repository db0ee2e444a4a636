"""From a Python function to the address of a compiled kernel, kept on disk.

Numba's own cache of a function looks at nothing but that function's file, so a helper that changed in another file
would be served stale. Here the folder is named after the contents of the whole package, the versions of Numba and
Python are in Numba's own key, as are the processor's name and features.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import platformdirs
from numba import njit, types
from numba.core import caching
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic
from numba.core.serialize import dumps as numba_dumps

from slimrt.paths import check_owner
from slimrt.prune import reach

__all__ = ["KERNEL", "Kernel", "compile_kernel", "inline"]

log = logging.getLogger(__name__)

_DIGEST = 32  # bytes
_UNUSED_S = 60 * 24 * 3600  # after two months

BAKED_IN = (reach,)  # modules outside of this package whose constants are compiled into kernels

KERNEL = types.void(types.int64, types.int64, types.int64)  # (item, thread, args)
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}

if hasattr(os, "register_at_fork"):
    # A fork waits while another thread compiles: that thread is not in the child, to finish and to let go of the lock.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def inline(function: Callable[..., Any]) -> Any:
    """A function that kernels call; LLVM puts it in line where that pays.

    Kernels alone: it has no entry for Python, nor one for C. To compile these two takes more than a third of the time,
    and adds nothing to the kernels' machine code.
    """
    _name_closure(function)
    return njit(**_OPTIONS, inline="never", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def _name_closure(function: Callable[..., Any]) -> None:
    """Add to the function's name what its closure holds.

    Machine code that comes from the cache brings its helpers' names along, made of the qualified name and a number that
    counts compilations. Two functions of one factory, one of them compiled by another process, may then agree in
    both, and LLVM's linker would take the one that it met first for either.
    """
    if function.__closure__ and "#" not in function.__qualname__:
        function.__qualname__ += "#" + hashlib.sha256(_held(function).encode()).hexdigest()[:16]


def _held(value: Any) -> str:
    """What ``value``, found in a closure, is: the same text in every process, another one for another value."""
    if isinstance(value, (type(None), bool, int, float, str, np.generic, types.Type)):
        return f"{type(value).__name__} {value}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_held, value))}]"
    if is_dataclass(value) and not isinstance(value, type):
        return _held([type(value).__name__, *(getattr(value, field.name) for field in fields(value))])
    if isinstance(value, Dispatcher):
        return _held(value.py_func)
    if isinstance(value, _Intrinsic):
        return _held(value._defn)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return _held([value.__module__, value.__qualname__, *cells])
    raise TypeError(f"a kernel's closure holds a {type(value).__name__}; its name cannot say which one; see _held")


class Kernel:
    """A compiled kernel; ``address`` is what a team's program names. Made by ``compile_kernel``."""

    def __init__(self, function: Any) -> None:
        self._function = function  # owns the machine code
        self.address: int = function.address


def compile_kernel(function: Callable[..., Any], key: str, signature: Any = KERNEL) -> Kernel:
    """Compile ``function``, or load it from the cache.

    ``key`` names what the function's closure holds (features, types, widths): kernels of one function and different
    closures must have different keys.
    """
    _name_closure(function)
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {"nopython": True, **_OPTIONS})
    compiled._cache = _KernelCache(function, key)
    compiled.compile()
    return Kernel(compiled)


@cache
def package_digest() -> str:
    """SHA-256 (hex) of this package's sources, and of those whose numbers kernels have in them: what decides whether a
    cached kernel is still the right one."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), *(Path(str(module.__file__)) for module in BAKED_IN)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


package_digest()  # now, of the sources that this process runs: they may be replaced while it does


def cache_folder() -> Path:
    """Where this version of the package keeps its kernels: beside the models (``$SLIMRT_CACHE`` moves both)."""
    override = os.environ.get("SLIMRT_CACHE")
    place = Path(override).expanduser() if override else platformdirs.user_cache_path("slimrt")
    return place / "kernels" / package_digest()


def _drop_unused(parent: Path) -> None:
    """Remove the folders of other versions in which nothing was compiled for a long time."""
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(folder)


class _Locator:
    """Where one kernel is kept: what Numba's cache asks of a locator."""

    def __init__(self, key: str) -> None:
        self._key = key

    def ensure_cache_path(self) -> None:
        folder = cache_folder()
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # another process may be as far
            _drop_unused(folder.parent)

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


class _KernelFiles:
    """One file for each kernel: SHA-256 of the rest, and the rest, which Numba pickles.

    Unpickling runs what the file says, and so does the code in it: it has to be ours, and whole.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def path(self, key: Any) -> Path:
        """Where the kernel of ``key`` is kept."""
        made_by = numba.__version__, sys.version, key
        return cache_folder() / f"{self._name}-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:24]}.kernel"

    def load(self, key: Any) -> Any:
        """What ``save`` kept, or None. Raises OSError for a file that is not ours, ValueError for a damaged one."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                for name, status in ((path.parent, path.parent.stat()), (path, os.fstat(file.fileno()))):
                    check_owner(name, status)
                whole = file.read()
        except FileNotFoundError:
            return None
        digest, data = whole[:_DIGEST], whole[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(f"{path.name} does not match its checksum")
        return pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        """Keep ``data``, whole or not at all."""
        path, pickled = self.path(key), numba_dumps(data)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(pickled).digest() + pickled)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


class _KernelCache(caching.FunctionCache):
    """Numba's cache of compiled functions, in our files, under our key; a folder that cannot be used is named once."""

    def __init__(self, function: Callable[..., Any], key: str) -> None:
        self._key, self._name = key, function.__qualname__
        self._impl_class = lambda function: _CacheImpl(function, key)
        super().__init__(function)
        self._cache_file = _KernelFiles(self._impl.filename_base)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), self._key

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(signature, target_context)
            if found is None:
                _tell(self._name)
            return found
        except Exception as error:  # whatever unpickling makes of a file of another version
            _complain(error)
            with contextlib.suppress(OSError):
                self._cache_file.path(self._index_key(signature, target_context.codegen())).unlink(missing_ok=True)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _complain(error)


_told: set[Path] = set()


def _tell(name: str) -> None:
    """One line for each folder, since a person waits; and which kernel, for whoever shows what is being done."""
    folder = cache_folder()
    if folder not in _told:
        _told.add(folder)
        log.info("compiling kernels for this processor; this happens once, and takes up to a minute in all")
    log.debug("compiling %s", name)


_complained: set[Path] = set()


def _complain(error: Exception) -> None:
    """One line for each folder, whatever else goes wrong with it."""
    folder = cache_folder()
    if folder not in _complained:
        _complained.add(folder)
        warnings.warn(
            f"{folder}: compiled kernels cannot be kept here, or those here are damaged or not yours "
            f"({type(error).__name__}: {error}); they are compiled in memory, which takes some seconds at every start; "
            "make the folder yours alone and writable (chmod go-w), or remove it",
            stacklevel=2,
        )
