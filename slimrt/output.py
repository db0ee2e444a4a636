"""Files that a command writes: where they may go, whole or not at all, nothing overwritten unless asked for."""

from __future__ import annotations

import glob
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimrt.errors import OutputError

if sys.platform != "win32":  # there an open file cannot be removed in any case
    import fcntl

__all__ = ["check_output", "counted", "human_bytes", "remove_leftovers", "whole_or_nothing", "write_atomically"]


def human_bytes(count: float) -> str:
    """``98362432`` -> ``"93.8 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def counted(count: int, thing: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def check_output(target: Path, *, sources: Iterable[Path] = (), force: bool = False) -> None:
    """Raises OutputError unless a result may be written to ``target``; called before any work is done for it.

    ``sources``: files that the result is made from, which it never replaces. Any other regular file is replaced with
    ``force`` only; devices, pipes and folders never are.
    """
    if "\0" in str(target):
        raise OutputError(f"{target}: no file can have a NUL byte in its name; choose another name")
    try:
        found = target.stat()
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}; choose another name") from None
    if found is None:
        if target.is_symlink():
            raise OutputError(f"{target}: a link to nothing; name the file that is to be written")
        if not target.parent.is_dir():
            raise OutputError(f"{target}: the folder {target.parent} does not exist; create it first")
        _check_folder(target)
        return
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{target}: a folder; the result is one file; name it, as in {target / 'result'}")
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(f"{target}: a device or a pipe; results are written to regular files; choose another name")
    if any(_same(target, source) for source in sources):
        raise OutputError(f"{target}: source and result are the same file; name another file for the result")
    _check_folder(target)
    if not force:
        raise OutputError(f"{target}: exists already; choose another name, or replace it with --force (force=True)")


def _check_folder(target: Path) -> None:
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target}: the folder {target.parent} cannot be written; choose another, or its permissions")


def _same(target: Path, source: Path) -> bool:
    try:
        return target.samefile(source)
    except OSError:  # a source that cannot be looked at is refused where it is read
        return False


@contextmanager
def whole_or_nothing(target: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary file beside ``target``, renamed to it at the end and removed on any failure or interruption.

    What killed runs left for the same target is removed first; a run that is still writing keeps its own. ``private``:
    only the user may read the file. Raises OSError.
    """
    target = target.resolve()  # the file behind a link is replaced, not the link
    remove_leftovers(target.parent, target.name)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666)
    try:
        if sys.platform == "win32":
            os.close(handle)  # an open file cannot be renamed
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while it is held, no other run takes it for left over
        yield part
        part.replace(target)
        _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(handle)


def remove_leftovers(folder: Path, name: str, *, any_beginning: bool = False) -> None:
    """Remove what killed runs left of the file ``name`` in ``folder`` (``any_beginning``: of all files whose names end
    so); a run that is still writing keeps its own."""
    begin = "*" if any_beginning else ""
    for part in folder.glob(f".{begin}{glob.escape(name)}.{'[0-9a-f]' * 8}.part"):
        with suppress(OSError), part.open("rb") as file:  # locked: a run is writing it; gone or not ours: no matter
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename durable; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | Path, data: bytes) -> None:
    """``data`` in the file ``path``, whole or not at all. Raises OSError."""
    with whole_or_nothing(Path(path)) as part:
        part.write_bytes(data)
