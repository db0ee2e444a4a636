"""Paths as callers give them."""

from __future__ import annotations

import os
from pathlib import Path

from slimrt.errors import SettingError

__all__ = ["user_path"]


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` for the user's folder. Raises SettingError for what is no path, or names an unknown user."""
    if not isinstance(path, (str, os.PathLike)):
        raise SettingError(f"path {path!r}: must be a text or a pathlib.Path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise SettingError(f"path {str(path)!r}: {error}; write the folder out") from None
