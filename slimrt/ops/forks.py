"""What a forked child finds. It has the memory of its parent and one thread: locks that other threads held stay closed
in it, and threads that it would wait for are not there."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["after_fork", "open_lock"]

_known: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()


def after_fork(owner: Any, begin_again: Callable[[Any], object]) -> None:
    """In every child that this process forks from now on, call ``begin_again(owner)``, while ``owner`` lives."""
    _known[owner] = begin_again


def open_lock(owner: Any) -> None:
    """For ``after_fork``: another lock like ``owner._lock`` in its place, which whoever held it may never give back."""
    owner._lock = threading.Lock() if isinstance(owner._lock, type(threading.Lock())) else threading.RLock()


def _in_child() -> None:
    for owner, begin_again in list(_known.items()):
        begin_again(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
