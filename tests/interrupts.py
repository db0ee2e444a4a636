"""Ctrl-C wherever it may come, without a keyboard: a trace function raises KeyboardInterrupt at a chosen moment.

The interpreter looks for signals after calls, at the beginning of a function and where a loop turns round: so it does
here, in the product and in what of the standard library keeps state between its bytecodes.
"""

from __future__ import annotations

import concurrent.futures
import dis
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import slimrt

_FOLDERS = (str(Path(slimrt.__file__).parent.parent), str(Path(concurrent.futures.__file__).parent))
_FILES = (threading.__file__, queue.__file__)
_LOOKS = {
    dis.opmap[name]
    for name in ("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")
    if name in dis.opmap
}  # fmt: skip


def _counts(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name in _FILES or (name.startswith(_FOLDERS) and "/tests/" not in name and "/site-packages/" not in name)


def _moments(call: Callable[[], Any], at: int | None) -> tuple[int, bool]:
    """Run ``call`` up to its moment number ``at`` -> how many passed, and whether it was interrupted."""
    seen, struck = 0, False
    before: dict[FrameType, int] = {}  # the opcode that a frame ran last

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen, struck
        if not _counts(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            looks = before.get(frame) in _LOOKS
            before[frame] = frame.f_code.co_code[frame.f_lasti]
            if looks:
                seen += 1
                if at is not None and seen > at and not struck:
                    struck = True
                    raise KeyboardInterrupt
        elif event == "return":
            before.pop(frame, None)
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        if not struck:
            raise
    finally:
        sys.settrace(old)
    return seen, struck


def interrupted(call: Callable[[], Any], at: int) -> bool:
    """Run ``call`` and raise KeyboardInterrupt at its moment number ``at``; False if it ended before."""
    return _moments(call, at)[1]


def moments(call: Callable[[], Any]) -> int:
    """At how many moments ``call`` may be interrupted."""
    return _moments(call, None)[0]


def spread(total: int, points: int, first: int = 0) -> Iterator[int]:
    """``points`` numbers in ``first``..``total``, evenly; all of them where they are fewer."""
    step = max(1.0, (total - first) / points)
    at = float(first)
    while at < total:
        yield int(at)
        at += step
