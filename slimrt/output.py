"""What several commands need to show and to store results."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["human_bytes", "write_atomically"]


def human_bytes(count: float) -> str:
    """``98362432`` -> ``"93.8 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def write_atomically(path: str | Path, data: bytes) -> None:
    """``data`` in the file ``path``, whole or not at all. Raises OSError."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp lets nobody else read; a report is as readable as any file that the user writes.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
