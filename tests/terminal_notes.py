"""What a command says on stderr, the same on every processor."""

from __future__ import annotations

from typing import TypeVar

from slimrt.ops.backend import fast_features

__all__ = ["without_backend_note"]

Text = TypeVar("Text", str, bytes)


def without_backend_note(said: Text) -> Text:
    """``said`` without the line that a model says where compiled kernels cannot run, and NumPy computes. Elsewhere no
    line is left out: there it would be a mistake."""
    features, why = fast_features()
    if features is not None:
        return said
    line = f"note: computing with {why}\n"
    return said.replace(line, "", 1) if isinstance(said, str) else said.replace(line.encode(), b"", 1)
