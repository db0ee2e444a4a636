"""A stand-in for CuPy on a machine without a GPU: what slimrt uses of it, as strict as the real one or stricter.

    fake = FakeCupy(monkeypatch)            # ``import cupy`` now gives the stand-in
    ops = CupyOps()

Kernels are the sources of ``kernels_cu``, run on the CPU by ``tests.emulation``. Arrays live in memory of their own
that NumPy functions refuse. Streams are queues: work is done when its stream may and must do it, so that a missing
event shows.

* ``copies="late"``: the copy stream does nothing until somebody waits for it; what it will write holds NaN until then.
* ``compute="late"``: the same of the default stream, so that a copy which does not wait for compute runs too early.

Memory that is given back is filled with NaN, in the order of its stream, as CuPy's pool would use it for something
else. A captured graph does the same with its own at each launch, and starts from NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from tests import emulation
from tests.kernel_cases import full, half

BITS = "bits of bfloat16: only kernels know their numbers"


def _numbers(x: np.ndarray) -> np.ndarray:
    return full(x) if x.dtype == np.uint16 else x


def _as_cupys(name: str, base: type[Exception]) -> type[Exception]:
    return type(name, (base,), {"__module__": "cupy_backends.cuda.api.runtime"})


CUDARuntimeError = _as_cupys("CUDARuntimeError", RuntimeError)
OutOfMemoryError = _as_cupys("OutOfMemoryError", MemoryError)
CompileException = _as_cupys("CompileException", Exception)


class Queue:
    """The work of one stream, in order. ``done``: how many pieces; ``late``: only where somebody waits."""

    def __init__(self, machine: FakeCupy, late: bool) -> None:
        self.machine, self.late = machine, late
        self.pending: deque[Callable[[], None]] = deque()
        self.submitted = self.done = 0
        self.recording: list[Callable[[], None]] | None = None
        self._waits: dict[int, tuple[Queue, int]] = {}  # by number of the piece: what it waits for

    def submit(self, work: Callable[[], None]) -> None:
        if self.machine.lost:
            raise CUDARuntimeError(self.machine.lost)
        if self.recording is not None:
            self.recording.append(work)
            return
        self.pending.append(work)
        self.submitted += 1
        if not self.late:
            self.pump()

    def wait_for(self, other: Queue, point: int) -> None:
        self._waits[self.submitted] = other, point
        self.submit(lambda: None)

    def pump(self) -> None:
        """Do what needs nobody else."""
        while self.pending:
            other, point = self._waits.get(self.done, (self, 0))
            if other.done < point:
                return
            self._next()

    def force(self, point: int) -> None:
        """Do the first ``point`` pieces, and what they wait for."""
        while self.done < point:
            other, wanted = self._waits.get(self.done, (self, 0))
            other.force(wanted)
            self._next()

    def _next(self) -> None:
        work = self.pending.popleft()
        self._waits.pop(self.done, None)
        self.done += 1
        work()


class Allocation:
    """Device memory; when the last array in it goes, its bytes do too, in the stream's order."""

    def __init__(self, machine: FakeCupy, nbytes: int) -> None:
        queue = machine.current.queue
        if queue.recording is not None and machine.allocator is None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )
        if machine.room is not None and machine.used + nbytes > machine.room:
            raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes (allocated so far: {machine.used} bytes).")
        machine.used += nbytes
        self.bytes = np.full(nbytes + 16, 0xFF, np.uint8)
        skip = -self.bytes.ctypes.data % 16
        self.bytes = memory = self.bytes[skip : skip + nbytes]
        if queue.recording is not None:  # a graph finds nothing in its memory, whatever its last launch left there
            queue.recording.insert(0, lambda: memory.fill(0xFF))
        weakref.finalize(self, _give_back, machine, queue, self.bytes).atexit = False


def _give_back(machine: FakeCupy, queue: Queue, memory: np.ndarray) -> None:
    machine.used -= memory.nbytes
    if not machine.lost:  # in a graph that is being captured: whatever it allocates next may lie there
        queue.submit(lambda: memory.fill(0xFF))


class Array:
    """A device array: a view of an allocation. It knows no NumPy, and NumPy does not know it."""

    __array_ufunc__ = None  # numpy_array + array is refused

    def __init__(self, machine: FakeCupy, view: np.ndarray, memory: Allocation) -> None:
        self._machine, self._a, self._memory = machine, view, memory
        self.device = types.SimpleNamespace(id=0)

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    data = property(lambda self: types.SimpleNamespace(ptr=self._a.ctypes.data))
    strides = property(lambda self: self._a.strides)
    flags = property(lambda self: self._a.flags)

    def __len__(self) -> int:
        return len(self._a)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_function__(self, function: Any, _: Any, args: Any, kwargs: Any) -> Any:
        if function is np.empty_like:
            return self._machine.empty(kwargs.get("shape") or self.shape, self.dtype)
        if function is np.concatenate:
            parts = args[0]
            out = self._machine.empty((sum(len(part) for part in parts), *self.shape[1:]), self.dtype)
            at = 0
            for part in parts:
                out[at : at + len(part)] = part
                at += len(part)
            return out
        return NotImplemented

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo: Any) -> Array:
        return self._elementwise(np.copy)

    def _view(self, view: np.ndarray) -> Array:
        assert np.may_share_memory(view, self._a) or not view.size, "this would be a copy, not a view"
        return Array(self._machine, view, self._memory)

    def _picked(self, key: tuple[Any, ...]) -> Array:
        """By arrays of indices on the device: a copy."""
        stand_in = tuple(np.zeros(part.shape, np.int64) if isinstance(part, Array) else part for part in key)
        out = self._machine.empty(np.empty(self.shape, np.bool_)[stand_in].shape, self.dtype)
        source, target = self._a, out._a
        real = tuple(part._a if isinstance(part, Array) else part for part in key)
        self._machine.submit(lambda: np.copyto(target, source[real]))
        return out

    def __getitem__(self, key: Any) -> Array:
        if isinstance(key, tuple) and any(isinstance(part, Array) for part in key):
            return self._picked(key)
        for part in key if isinstance(key, tuple) else (key,):
            assert part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice)), f"index {part!r}"
        view = self._a[key]
        return self._view(view if isinstance(view, np.ndarray) else self._a[(*np.atleast_1d(key),)].reshape(()))

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self._a[key]
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        source = value._a if isinstance(value, Array) else value
        assert not isinstance(value, Array) or (self.dtype == np.uint16) == (value.dtype == np.uint16), BITS
        self._machine.submit(lambda: np.copyto(target, source, casting="same_kind"))

    def reshape(self, *shape: Any) -> Array:
        return self._view(self._a.reshape(*shape))

    def transpose(self, *axes: Any) -> Array:
        return self._view(self._a.transpose(*axes))

    T = property(lambda self: self.transpose())

    def view(self, dtype: Any) -> Array:
        return self._view(self._a.view(dtype))

    def _elementwise(self, function: Any, *others: Any) -> Array:
        for other in others:
            if isinstance(other, np.ndarray):
                raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        arrays = [self._a, *(other._a if isinstance(other, Array) else other for other in others)]
        probe = function(*(np.ones((1,) * a.ndim, a.dtype) if isinstance(a, np.ndarray) else a for a in arrays))
        shape = np.broadcast_shapes(*(np.shape(a) for a in arrays))
        out = self._machine.empty(shape, probe.dtype)
        target = out._a

        def work() -> None:
            with np.errstate(all="ignore"):
                target[...] = function(*arrays)

        self._machine.submit(work)
        return out

    def astype(self, dtype: Any) -> Array:
        assert self.dtype != np.uint16, BITS
        return self._elementwise(lambda a: a.astype(dtype))

    def __add__(self, other: Any) -> Array:
        assert self.dtype != np.uint16, BITS
        return self._elementwise(np.add, other)

    def __mul__(self, other: Any) -> Array:
        assert self.dtype != np.uint16, BITS
        return self._elementwise(np.multiply, other)

    def __iadd__(self, other: Array) -> Array:
        assert self.dtype != np.uint16, BITS
        target, source = self._a, other._a
        self._machine.submit(lambda: np.add(target, source, out=target, casting="same_kind"))
        return self

    def set(self, source: np.ndarray, stream: Stream | None = None) -> None:
        """Asynchronous from pinned memory; pageable memory is read at once."""
        machine = self._machine
        if type(source) is not np.ndarray and not isinstance(source, np.memmap):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != source.dtype:
            raise TypeError(f"{source.dtype} array cannot be set to {self.dtype} array")
        if self.shape != source.shape:
            raise ValueError("Shape mismatch.")
        if not self._a.flags.c_contiguous or not source.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        queue = (stream or machine.current).queue
        if queue.recording is not None:
            raise RuntimeError("the current stream is capturing, so synchronous API cannot be called")
        machine.count_copy()
        target = self._a
        if not machine.is_pinned(source):
            source = source.copy()
        if not queue.pending:  # else something that is still to be read may lie there
            machine.spoil(target)
        queue.submit(lambda: np.copyto(target, source))

    def get(
        self, stream: Stream | None = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        machine = self._machine
        queue = (stream or machine.current).queue
        if queue.recording is not None:
            raise RuntimeError("the current stream is capturing, so synchronous API cannot be called")
        if out is None:
            assert blocking, "an asynchronous copy needs pinned memory to go to"
            out = np.empty(self.shape, self.dtype)
        else:
            assert out.shape == self.shape and out.dtype == self.dtype and out.flags.c_contiguous
            assert blocking or machine.is_pinned(out), "an asynchronous copy to pageable memory"
        machine.count_copy()
        source, target = self._a, out
        if not queue.pending:
            machine.spoil(target)
        queue.submit(lambda: np.copyto(target, source))
        if blocking:
            queue.force(queue.submitted)
        return out


class Stream:
    def __init__(self, null: bool = False, non_blocking: bool = False, priority: int = 0) -> None:
        machine = FakeCupy.running
        if null:
            self.queue = Queue(machine, machine.compute == "late")
        else:
            self.queue = Queue(machine, machine.copies == "late")
        self.non_blocking, self.priority = non_blocking, priority
        machine.streams.append(self)

    def __enter__(self) -> Stream:
        FakeCupy.running.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert FakeCupy.running.entered.pop() is self

    def synchronize(self) -> None:
        if self.queue.machine.lost:
            raise CUDARuntimeError(self.queue.machine.lost)
        self.queue.force(self.queue.submitted)

    def wait_event(self, event: Event) -> None:
        if self.queue.recording is None:
            self.queue.wait_for(event.queue, event.point)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def begin_capture(self) -> None:
        assert self is not FakeCupy.running.null, "the legacy stream cannot be captured"
        assert not self.queue.pending, "what was to run before the capture has not been waited for"
        self.queue.recording = []

    def end_capture(self) -> Graph:
        work, self.queue.recording = self.queue.recording, None
        assert work is not None
        self.queue.machine.graphs += 1
        return Graph(work)


class Graph:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self._work = work

    def launch(self, stream: Stream | None = None) -> None:
        for work in self._work:
            (stream or FakeCupy.running.current).queue.submit(work)


class Event:
    _clock = itertools.count()

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.timed = not disable_timing
        self.queue, self.point, self.at = FakeCupy.running.null.queue, 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self.queue = (stream or FakeCupy.running.current).queue
        if self.queue.machine.lost:
            raise CUDARuntimeError(self.queue.machine.lost)
        self.point, self.at = self.queue.submitted, next(Event._clock)

    @property
    def done(self) -> bool:
        if self.queue.machine.lost:
            raise CUDARuntimeError(self.queue.machine.lost)
        return self.queue.done >= self.point

    def synchronize(self) -> None:
        self.queue.force(self.point)


class PinnedMemory:
    def __init__(self, size: int, flags: int = 0) -> None:
        machine = FakeCupy.running
        if machine.pinnable is not None and machine.pinned_bytes + size > machine.pinnable:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        machine.pinned_bytes += size
        machine.pinned_calls += 1
        self.memory = np.full(size, 0xFF, np.uint8)
        machine.pinned.append(self.memory)


class PinnedMemoryPointer:
    """Gives its bytes from ``offset`` on to ``numpy.frombuffer``."""

    def __new__(cls, mem: PinnedMemory, offset: int) -> Any:
        return memoryview(mem.memory)[offset:]  # type: ignore[arg-type]


class RawModule:
    """Compiles the pasted source with g++ when a kernel is asked for."""

    def __init__(self, code: str, options: Sequence[str] = ()) -> None:
        self.code, self.options = code, tuple(options)
        self._defines = dict(option[2:].split("=", 1) for option in options if option.startswith("-D"))

    def compile(self) -> None:
        try:
            self._module = emulation.compiled(self.code, self._defines)
        except emulation.EmulationError as error:
            raise CompileException(str(error)) from error

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(name, self._module.kernel(name))


class RawKernel:
    def __init__(self, name: str, kernel: emulation.Kernel) -> None:
        self.name, self._kernel = name, kernel
        self.max_dynamic_shared_size_bytes = kernel.max_dynamic_shared_size_bytes

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], *, shared_mem: int = 0) -> None:
        machine = FakeCupy.running
        for number, arg in enumerate(args):
            assert isinstance(arg, (Array, np.generic)), f"{self.name}: argument {number} is {type(arg).__name__}"
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDARuntimeError("cudaErrorInvalidValue: too much shared memory")
        self._kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        raw = tuple(arg._a if isinstance(arg, Array) else arg for arg in args)
        machine.launches.append(self.name)
        machine.submit(lambda: self._kernel(grid, block, raw, shared_mem=shared_mem))


class Nvrtc(types.ModuleType):
    """``cupy_backends.cuda.libs.nvrtc``: a program is its place in a list, its cubin that number."""

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self._programs: list[tuple[str, emulation.Module | None, str]] = []

    def createProgram(self, src: str, name: str, headers: Sequence[str], include_names: Sequence[str]) -> int:
        assert not headers and not include_names and "#include" not in src
        self._programs.append((src, None, ""))
        return len(self._programs) - 1

    def compileProgram(self, program: int, options: Sequence[str]) -> None:
        assert "-arch=sm_90a" in options, "RawModule is there for plain architectures"
        code, _, _ = self._programs[program]
        defines = dict(option[2:].split("=", 1) for option in options if option.startswith("-D"))
        try:
            self._programs[program] = code, emulation.compiled(code, defines), ""
        except emulation.EmulationError as error:
            self._programs[program] = code, None, str(error)
            raise CompileException("NVRTC_ERROR_COMPILATION (6)") from error

    def getProgramLog(self, program: int) -> str:
        return self._programs[program][2]

    def getCUBIN(self, program: int) -> bytes:
        return str(program).encode()

    def destroyProgram(self, program: int) -> None:
        assert self._programs[program] is not None

    def module(self, cubin: bytes) -> emulation.Module:
        module = self._programs[int(cubin)][1]
        assert module is not None
        return module


class Module:
    """``cupy.cuda.function.Module``; its functions are numbers to the driver."""

    functions: ClassVar[list[RawKernel]] = []

    def load(self, cubin: bytes) -> None:
        self._module = sys.modules["cupy_backends.cuda.libs.nvrtc"].module(cubin)

    def get_function(self, name: str) -> Function:
        Module.functions.append(RawKernel(name, self._module.kernel(name)))
        return Function(len(Module.functions) - 1)


class Function:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], shared_mem: int = 0) -> None:
        Module.functions[self.ptr](grid, block, args, shared_mem=shared_mem)


def set_attribute(ptr: int, attribute: int, value: int) -> None:
    assert attribute == 8, "only ever used for dynamic shared memory"
    Module.functions[ptr].max_dynamic_shared_size_bytes = value


class MemoryPool:
    def __init__(self) -> None:
        FakeCupy.running.pools += 1

    def malloc(self, nbytes: int) -> None:
        raise AssertionError("only ever handed to using_allocator")

    def total_bytes(self) -> int:
        return 0


class FakeCupy:
    """One GPU. ``room``: bytes of its memory that may be used; ``pinnable``: the same of host memory; ``fail_at``: the
    copy of that number is refused; ``lost``: what every call raises from when it is set; ``without``: a library that is
    missing."""

    running: FakeCupy

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch | None = None,
        *,
        copies: str = "early",
        compute: str = "early",
        room: int | None = None,
        pinnable: int | None = None,
        fail_at: int | None = None,
        capability: tuple[int, int] = (9, 0),
        driver: int = 13000,
        runtime: int = 13000,
        devices: int = 1,
        total: int = 80 << 30,
        without: str = "",
    ) -> None:
        self.copies, self.compute, self.room, self.pinnable, self.fail_at = copies, compute, room, pinnable, fail_at
        self.lost: str | None = None
        self.used = self.pinned_bytes = self.pinned_calls = self.copy_count = self.graphs = self.pools = 0
        self.pinned: list[np.ndarray] = []
        self.launches: list[str] = []
        self.streams: list[Stream] = []
        self.entered: list[Stream] = []
        self.allocator: object = None
        FakeCupy.running = self
        self.null = Stream(null=True)
        self._facts = capability, driver, runtime, devices, total
        self.module = self._module()
        if monkeypatch is not None:
            monkeypatch.setitem(sys.modules, "cupy", self.module)
            for name in ("cublas", "nvrtc"):
                made = Nvrtc() if name == "nvrtc" else types.ModuleType(name)
                library = made if name != without else None  # None: importing it raises ImportError
                monkeypatch.setitem(sys.modules, f"cupy_backends.cuda.libs.{name}", library)  # type: ignore[arg-type]
                if name == "cublas" and library is not None:
                    library.gemmEx = self.gemm_ex  # type: ignore[attr-defined]
            function, driver_api = types.ModuleType("cupy.cuda.function"), types.ModuleType("driver")
            function.Module = Module  # type: ignore[attr-defined]
            driver_api.funcSetAttribute = set_attribute  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "cupy.cuda.function", function)
            monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api.driver", driver_api)

    # -- for the classes above ---------------------------------------------------------------------------------------

    @property
    def current(self) -> Stream:
        return self.entered[-1] if self.entered else self.null

    def submit(self, work: Callable[[], None]) -> None:
        self.current.queue.submit(work)

    def count_copy(self) -> None:
        self.copy_count += 1
        if self.fail_at is not None and self.copy_count == self.fail_at:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")

    def is_pinned(self, array: np.ndarray) -> bool:
        return any(np.may_share_memory(array, pinned) for pinned in self.pinned)

    def spoil(self, target: np.ndarray) -> None:
        if target.size:
            target.view(np.uint8)[...] = 0xFF if target.flags.c_contiguous else 0

    def empty(self, shape: Any, dtype: Any = float) -> Array:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        memory = Allocation(self, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return Array(self, memory.bytes.view(dtype).reshape(shape), memory)

    def gemm_ex(
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int,
        b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algo: int,
    ) -> None:  # fmt: skip
        """cublasGemmEx for a transposed a and 16-bit operands: column-major c [m, n] = alpha a.T b + beta c.

        Summed in float64: which bits a sum in float32 has depends, in a BLAS, on how many rows it has beside it.
        """
        if self.current.queue.recording is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        assert (handle, transa, transb, compute) == (1, 1, 0, 68) and a_type == b_type and c_type in (0, a_type)
        assert lda >= k and ldb >= k and ldc >= m

        def matrix(address: int, kind: int, rows: int, stride: int, columns: int) -> np.ndarray:
            dtype = np.dtype({0: np.float32, 2: np.float16, 14: np.uint16}[kind])
            size = ((rows - 1) * stride + columns) * dtype.itemsize
            flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
            return np.lib.stride_tricks.as_strided(flat, (rows, columns), (stride * dtype.itemsize, dtype.itemsize))

        first, second, out = matrix(a, a_type, m, lda, k), matrix(b, b_type, n, ldb, k), matrix(c, c_type, n, ldc, m)
        scale, keep = (ctypes.c_float.from_address(address).value for address in (alpha, beta))

        def work() -> None:
            with np.errstate(all="ignore"):
                left, right = (_numbers(side).astype(np.float64) for side in (second, first))
                product = scale * (left @ right.T)
                product = product + keep * _numbers(out) if keep else product
                out[...] = half(product.astype(np.float32), "bf16") if out.dtype == np.uint16 else product

        self.submit(work)

    # -- the package -------------------------------------------------------------------------------------------------

    def _module(self) -> types.ModuleType:
        capability, driver, runtime, devices, total = self._facts
        module = types.ModuleType("cupy")

        def asarray(a: Any, dtype: Any = None) -> Array:
            if isinstance(a, Array):
                return a if dtype is None or a.dtype == dtype else a.astype(dtype)
            a = np.array(a, dtype, order="C")
            out = self.empty(a.shape, a.dtype)
            if self.current.queue.recording is not None:
                raise RuntimeError("the current stream is capturing, so synchronous API cannot be called")
            target = out._a
            self.submit(lambda: np.copyto(target, a))
            return out

        @contextlib.contextmanager
        def using_allocator(allocator: object) -> Iterator[None]:
            before, self.allocator = self.allocator, allocator
            try:
                yield
            finally:
                self.allocator = before

        def properties(_: int) -> dict[str, Any]:
            # One multiprocessor: more would have hundreds of threads each to emulate.
            return {
                "name": b"Emulated GPU", "major": capability[0], "minor": capability[1], "multiProcessorCount": 1,
                "sharedMemPerBlockOptin": (227 if capability[0] == 9 else 99) << 10,
            }  # fmt: skip

        def count() -> int:
            if not driver:
                raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
            return devices

        def memory() -> tuple[int, int]:
            if self.lost:
                raise CUDARuntimeError(self.lost)
            return (total if self.room is None else self.room) - self.used, total

        module.__version__ = "14.2.0"  # type: ignore[attr-defined]
        module.ndarray, module.RawModule, module.asarray = Array, RawModule, asarray  # type: ignore[attr-defined]
        module.empty = lambda shape, dtype=float: self.empty(shape, dtype)  # type: ignore[attr-defined]
        module.ascontiguousarray = lambda a: a if a.flags.c_contiguous else a._elementwise(np.ascontiguousarray)  # type: ignore[attr-defined]
        module.asnumpy = lambda a: a.get()  # type: ignore[attr-defined]
        module.cos = lambda a: a._elementwise(np.cos)  # type: ignore[attr-defined]
        module.sin = lambda a: a._elementwise(np.sin)  # type: ignore[attr-defined]
        Stream.null = self.null  # type: ignore[attr-defined]
        module.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
            Stream=Stream, Event=Event, PinnedMemory=PinnedMemory, PinnedMemoryPointer=PinnedMemoryPointer,
            MemoryPool=MemoryPool, using_allocator=using_allocator,
            device=types.SimpleNamespace(get_cublas_handle=lambda: 1), get_elapsed_time=lambda a, b: float(b.at - a.at),
            runtime=types.SimpleNamespace(
                driverGetVersion=lambda: driver, runtimeGetVersion=lambda: runtime, getDeviceCount=count,
                getDeviceProperties=properties, memGetInfo=memory, CUDARuntimeError=CUDARuntimeError,
            ),
        )  # fmt: skip
        return module
