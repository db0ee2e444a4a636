"""Paths as callers give them."""

from __future__ import annotations

import os
from pathlib import Path

from slimrt.errors import SettingError

__all__ = ["check_owner", "user_path"]


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` for the user's folder. Raises SettingError for what is no path, or names an unknown user."""
    if not isinstance(path, (str, os.PathLike)):
        raise SettingError(f"path {path!r}: must be a text or a pathlib.Path")
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError as error:
        raise SettingError(f"path {str(path)!r}: {error}; no file can be called so") from None
    except RuntimeError as error:
        raise SettingError(f"path {str(path)!r}: {error}; write the folder out") from None


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError where somebody else could have written what lies at ``path``, whose status is given."""
    if hasattr(os, "geteuid") and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022):
        raise PermissionError(f"{path} belongs to another user, or others may write to it")
