"""Memory operations on a GPU: the rules of ``ops.numpy.memory``, kept by CUDA's streams and events.

Compute runs on the legacy default stream, so whatever touches an array outside a pass (a cache that grows, a session
that is restored) is ordered with it. Copies run on a stream of their own with priority; the two meet at events, both
ways. CuPy's pool gives freed memory to the next allocation on the same stream, which is safe there and nowhere else:
buffers that both streams touch are therefore held until the event after their copy has passed.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from slimrt.errors import DeviceError
from slimrt.ops.cuda.device import say_why
from slimrt.ops.cuda.element import Element

__all__ = ["CupyMemory", "Fence", "PinnedSlabs", "reported"]

Array = Any  # of CuPy, or of NumPy where it lies in host memory
Pairs = Sequence[tuple[Array, Array]]


@contextmanager
def reported() -> Iterator[None]:
    """Exceptions of CuPy and CUDA leave as DeviceError, one line with a remedy."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("cupy", "cupy_backends"):
            raise DeviceError(say_why(error)) from error
        raise


class Fence:
    """A point in one of the queues; ``error`` is what the copies before it raised when they were queued."""

    def __init__(self, event: Any, error: Exception | None = None) -> None:
        self.event, self.error = event, error

    def done(self) -> bool:
        """Whether the point has been passed, well or badly. Raises DeviceError if the GPU has failed meanwhile."""
        with reported():
            return bool(self.event.done)

    def synchronize(self) -> None:
        """Return when the point has been passed."""
        with reported():
            self.event.synchronize()


class PinnedSlabs:
    """Page-locked host memory in slabs of exact size, used again and never given back before ``close``.

    Pinning is slow (some GB/s), and CuPy's own pool rounds up to powers of two.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._free: dict[int, list[Any]] = {}  # by size: pointers

    def reserve(self, nbytes: int, count: int) -> None:
        """Pin ``count`` slabs of ``nbytes`` in one piece, unless so many lie ready."""
        ready = self._free.setdefault(nbytes, [])
        count -= len(ready)
        if count > 0 and nbytes:
            memory = self._pin(nbytes * count)
            ready.extend(self._pointer(memory, nbytes * number) for number in range(count))

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array; its slab is free again when neither it nor a view of it is left."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not nbytes:
            return np.empty(shape, dtype)
        ready = self._free.setdefault(nbytes, [])
        pointer = ready.pop() if ready else self._pointer(self._pin(nbytes), 0)
        root = np.frombuffer(pointer, np.uint8, nbytes)
        weakref.finalize(root, ready.append, pointer).atexit = False
        return root.view(dtype).reshape(shape)

    def _pin(self, nbytes: int) -> Any:
        try:
            return self._cupy.cuda.PinnedMemory(nbytes)
        except Exception as error:
            raise DeviceError(
                f"{nbytes / 2**20:,.1f} MiB of host memory cannot be pinned ({error}); lower ctx (--ctx), keep all "
                "rows on the GPU (no kv_budget), raise the limit of locked memory (ulimit -l), or use device='cpu' "
                "(--device cpu)"
            ) from error

    def _pointer(self, memory: Any, offset: int) -> Any:
        return self._cupy.cuda.PinnedMemoryPointer(memory, offset)

    def close(self) -> None:
        """Give back what nobody uses."""
        for ready in self._free.values():
            ready.clear()


class CupyMemory:
    """Allocation, copies and fences. ``dtype`` and ``kv_type`` are that of activations, keys and values."""

    def __init__(self, cupy: Any, element: Element) -> None:
        self._cupy, self.element = cupy, element
        self.dtype = self.kv_type = element.dtype
        with reported():
            self._compute = cupy.cuda.Stream.null
            self._copies = cupy.cuda.Stream(non_blocking=True, priority=-1)
        self._slabs = PinnedSlabs(cupy)
        self._under_way: deque[tuple[Fence, Pairs]] = deque()  # holds the arrays that copies touch
        # Where a benchmark wants to know: pairs of events around copies, and around where compute waits for one.
        self.observed: tuple[list[Any], list[Any]] | None = None

    def empty(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """Uninitialised memory on the device, of the element unless ``dtype`` says otherwise."""
        self._retire()  # before memory is taken that these may free
        with reported():
            return self._cupy.empty(shape, dtype or self.dtype)

    def pinned(self, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
        """Uninitialised page-locked host memory, of the element unless ``dtype`` says otherwise."""
        return self._slabs.take(shape, dtype or self.dtype)

    def reserve(self, shape: tuple[int, ...], count: int) -> None:
        """Pin now what ``count`` calls of ``pinned(shape)`` will ask for."""
        self._slabs.reserve(math.prod(shape) * np.dtype(self.kv_type).itemsize, count)

    def copy(self, pairs: Pairs, after: Fence | None = None) -> Fence:
        """Queue the copies (destination, source) in order, host to device or back; returns at once.

        They start when ``after`` has passed. If one cannot be queued the rest are left out, and so is whatever is
        queued after this fence; ``wait`` raises why. One side of a pair is C-contiguous host memory (another layout or
        type is converted here, on the host, when what is under way has ended); the device's side may be strided.
        """
        pairs = list(pairs)

        def queue() -> None:
            for destination, source in pairs:
                self._queue(destination, source)

        return self._queued(queue, pairs, after)

    def _queued(self, work: Callable[[], object], held: Pairs, after: Fence | None) -> Fence:
        """What ``copy`` promises, for ``work`` that queues on the copy stream and touches the arrays ``held``."""
        self._retire()
        error = after.error if after is not None else None
        if error is None:
            try:
                with self._copies:
                    if after is not None:
                        self._copies.wait_event(after.event)
                    with self._between(0, self._copies):
                        work()
            except Exception as failure:
                foreign = type(failure).__module__.split(".")[0] in ("cupy", "cupy_backends")
                error = DeviceError(say_why(failure)) if foreign else failure
        # Also after a failure: copies that were queued before it may still run.
        with reported():
            fence = Fence(self._event(self._copies), error)
        self._under_way.append((fence, held))
        return fence

    def _retire(self) -> None:
        """Let go of the arrays of copies that have ended."""
        while self._under_way and self._under_way[0][0].done():
            self._under_way.popleft()

    def _queue(self, destination: Array, source: Array) -> None:
        if destination.shape != source.shape:
            raise DeviceError(f"copy of {source.shape} to {destination.shape}: the shapes must be equal; this is a bug")
        if isinstance(source, np.ndarray):
            if source.dtype != destination.dtype or not source.flags.c_contiguous:
                self._copies.synchronize()  # an earlier copy may be what fills the source
                if source.dtype != destination.dtype and destination.dtype == self.dtype:
                    source = self.element.narrowed(source)
                source = np.ascontiguousarray(source, destination.dtype)
            if destination.flags.c_contiguous:
                destination.set(source, self._copies)
            else:
                packed = self._cupy.empty(
                    source.shape, source.dtype
                )  # of the copy stream, so it is used again in order
                packed.set(source, self._copies)
                destination[...] = packed
            return
        if not isinstance(destination, np.ndarray) or not destination.flags.c_contiguous:
            raise DeviceError("copy to the host: the destination must be C-contiguous host memory; this is a bug")
        if source.dtype != destination.dtype:
            raise DeviceError(f"copy of {source.dtype} to {destination.dtype} on the host; this is a bug")
        if not source.flags.c_contiguous:
            packed = self._cupy.empty(source.shape, destination.dtype)
            packed[...] = source
            source = packed
        source.get(self._copies, out=destination, blocking=False)

    def _event(self, stream: Any) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    @contextmanager
    def _between(self, kind: int, stream: Any) -> Iterator[None]:
        """Note when ``stream`` comes to what is queued within, and when it has done it, if that is observed."""
        if self.observed is None:
            yield
            return
        begun, ended = (self._cupy.cuda.Event() for _ in range(2))
        begun.record(stream)
        yield
        ended.record(stream)
        self.observed[kind].append((begun, ended))

    def total(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """Seconds between the events of each of ``pairs``, in all; after ``finish``."""
        with reported():
            return sum(float(self._cupy.cuda.get_elapsed_time(*pair)) for pair in pairs) / 1e3

    def mark(self) -> Fence:
        """A fence that passes when compute has done all that was asked of it, and waited for, so far."""
        with reported():
            return Fence(self._event(self._compute))

    def wait(self, fence: Fence) -> None:
        """What is computed from here on runs after ``fence``; raises what its copies raised."""
        with reported(), self._between(1, self._compute):
            self._compute.wait_event(fence.event)
        if fence.error is not None:
            raise fence.error

    def finish(self) -> None:
        """Return when both queues have done all that was asked."""
        with reported():
            self._compute.synchronize()
            self._copies.synchronize()
        self._under_way.clear()

    def to_host(self, x: Array) -> np.ndarray:
        """``x`` as a NumPy array, when all that was asked before has been computed."""
        if isinstance(x, np.ndarray):
            return x
        with reported(), self._compute:  # whatever stream the caller works on
            return self._cupy.asnumpy(x)

    def floats(self, x: Array) -> np.ndarray:
        """``x`` as float32 on the host."""
        found = self.to_host(x)
        return self.element.widened(found) if found.dtype == self.dtype else np.asarray(found, np.float32)

    def copied(self, x: Array) -> Array:
        """A copy of ``x`` on the device."""
        result = self.empty(x.shape, x.dtype)
        with reported():
            result[...] = x
        return result

    def upload(self, x: np.ndarray) -> Array:
        """A copy of ``x`` on the device, in order with compute."""
        with reported():
            return self._cupy.asarray(x)

    def load(self, destination: Array, source: np.ndarray) -> None:
        """Fill C-contiguous ``destination`` from pageable ``source`` of its shape and type: the driver reads it before
        this returns."""
        with reported():
            destination.set(source)

    def elapsed(self, work: Callable[[], object]) -> float:
        """Seconds that the GPU spends on what ``work`` queues for compute."""
        with reported():
            begun, ended = (self._cupy.cuda.Event() for _ in range(2))
            begun.record(self._compute)
            work()
            ended.record(self._compute)
            ended.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(begun, ended)) / 1e3

    def close(self) -> None:
        """Wait for all copies and give back host memory that nobody uses."""
        self.finish()
        self._slabs.close()
