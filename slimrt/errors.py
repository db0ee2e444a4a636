"""The errors that a user sees. Each is one line: the value, the rule it breaks, the remedy."""

from __future__ import annotations

_LONGEST = 1200  # characters of a message: a path may take some hundred, what a file says must be cut


class SlimrtError(Exception):
    """Something the caller can mend; the command line prints it as one line and exits with status 1."""

    def __init__(self, message: str) -> None:
        # Names out of a damaged file must not break the line, move the terminal's cursor or fill the screen.
        shown = message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown))


class ModelFileError(SlimrtError, ValueError):
    """The file is not a usable model: wrong magic, truncated, inconsistent, or of an unknown kind."""


class TokenizerError(SlimrtError):
    """The vocabulary in the file cannot be rebuilt, or a token id lies outside it."""


class ContextError(SlimrtError, ValueError):
    """The tokens do not fit into the context."""


class SettingError(SlimrtError, ValueError):
    """An option's value is outside its range, or two options contradict each other."""


class FetchError(SlimrtError, ValueError):
    """A model could not be fetched or stored."""


class OutputError(SlimrtError, ValueError):
    """A result cannot be written where it was asked for, or would replace a file of the user's."""


class SessionFileError(SlimrtError, ValueError):
    """A session cannot be saved to the file, or restored from it: damaged, foreign, or of another model."""


class ComputeError(SlimrtError):
    """The arithmetic left the finite numbers (NaN weights, corrupt tensors)."""


class DeviceError(SlimrtError):
    """The GPU cannot be used: missing, too old or too small, its driver or CuPy at fault, a launch or a copy failed."""
