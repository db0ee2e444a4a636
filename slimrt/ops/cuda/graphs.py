"""Captured graphs: what a task queues, recorded once and launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from slimrt.ops.cuda.early import EarlyLaunch
from slimrt.ops.cuda.memory import CupyMemory, reported
from slimrt.ops.cuda.modules import Kernels

__all__ = ["Captured", "Graphs"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """A recorded graph; ``result`` lies in memory of ``pool``, which is the graph's as long as it lives."""

    graph: Any
    stream: Any
    pool: Any
    result: Result

    def launch(self) -> Result:
        """Queue it; the result is valid until the next launch."""
        with reported():
            self.graph.launch(self.stream)
        return self.result


class Graphs(CupyMemory):
    """What ``CupyOps`` does to capture. ``overlaps``: kernels of a graph begin early where they can (Hopper)."""

    kernels: Kernels
    overlaps = False

    def capture(self, task: Callable[[], Result]) -> Captured[Result]:
        """A graph of what ``task`` queues. It is run twice: once at once, which compiles its kernels and fills a pool
        of memory that is the graph's own, and once to be recorded. It must not multiply matrices by cuBLAS."""
        cuda = self._cupy.cuda
        pool, ready = cuda.MemoryPool(), self.mark()
        stream = cuda.Stream(non_blocking=True)  # the default stream, and whoever uses it, must not be drawn in
        with reported(), cuda.using_allocator(pool.malloc), stream:
            stream.wait_event(ready.event)
            task()
            stream.synchronize()
            stream.begin_capture()
            self.kernels.early = EarlyLaunch() if self.overlaps else None
            try:
                result = task()
            finally:
                self.kernels.early = None
                graph = stream.end_capture()
        return Captured(graph, self._compute, pool, result)
