"""Leave to use the processor's tiles: the system keeps their 8 KiB of state for those processes only that ask
(Linux)."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

__all__ = ["tiles_granted"]

_ARCH_PRCTL = 158  # the number of the system call on x86-64
_REQUEST = 0x1023  # ARCH_REQ_XCOMP_PERM, Linux 5.16
_TILE_DATA = 18


@cache
def tiles_granted() -> bool:
    """Ask for this process, all of its threads and its later children; False where the system refuses or knows
    nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0
