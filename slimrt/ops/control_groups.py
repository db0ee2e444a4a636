"""Linux's control groups: what a container, a service or a batch job may use of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["folders", "read"]


def folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each group that the process is in under ``controller`` ("cpu", "memory"): versions 1 and 2,
    a child before its parents, whose limits hold too. ``root``: where /proc and /sys lie."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            version, base = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, base = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the group's path is often the host's, and the container's own group is mounted at the base.
        path = PurePosixPath(group.lstrip("/"))
        for part in [path, *path.parents]:
            yield version, base / part


def read(path: Path) -> str:
    """A file of the system; "" where it is absent or not for us to read: it then sets no limit that we could know."""
    try:
        return path.read_text()
    except OSError:
        return ""
