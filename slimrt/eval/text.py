"""The running text that recall and continuation are measured on: Python's own documentation, or the user's file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimrt.errors import SettingError
from slimrt.text.tokenizer import Tokenizer

__all__ = ["Corpus", "corpus_from_text", "load_corpus", "windows"]

DEFAULT_NAME = "pydoc_data.topics"


@dataclass(frozen=True, eq=False)
class Corpus:
    """``tokens`` [N] int64 of a text, without a begin token; ``sha256`` is that of its UTF-8 bytes."""

    name: str
    sha256: str
    tokens: np.ndarray


def load_corpus(tokenizer: Tokenizer, path: str | Path | None = None) -> Corpus:
    """The text of the UTF-8 file ``path``, or by default the language topics that Python ships (English, 460 kB).

    Raises SettingError if the file cannot be read, is no UTF-8 or is empty, or if this Python has no such topics.
    """
    if path is None:
        return corpus_from_text(tokenizer, _shipped_text(), DEFAULT_NAME)
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


def windows(corpus: Corpus, size: int, fresh: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
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
    return [corpus.tokens[start : start + size] for start in starts]
