"""Streamed text broken between words, so that a terminal does not break it within them."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

__all__ = ["WordWrap"]

# East Asian scripts write no blanks: a line may end after any of their characters.
_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uff60"
_WORD = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")


class WordWrap:
    """Text in pieces of any size -> the same text, with line ends in place of blanks where a line gets too wide.

    ``width`` is asked for each word, as the window may change. Words wider than that, and lines of a fenced code block,
    stay as they are.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._word = ""  # not yet known to be complete
        self._blank = ""  # blanks before it
        self._column = 0  # cells written on this line
        self._line = ""  # its beginning, to tell a fence
        self._code = False

    def push(self, text: str) -> str:
        """What can be shown after ``text``: all but the last word, which may go on."""
        out = []
        parts = _WORD.findall(self._word + text)
        self._word = parts.pop() if parts and not parts[-1].isspace() else ""
        for part in parts:
            if part == "\n":
                out.append(self._blank + part)
                self._end_line()
            elif part.isspace():
                self._blank += part
            else:
                out.append(self._placed(part))
        if cell_len(self._word) >= self._width():  # fits on no line, so there is nothing to wait for
            out.append(self._placed(self._word))
            self._word = ""
        return "".join(out)

    def flush(self) -> str:
        """The rest; the next text starts on a line of its own."""
        out = self._placed(self._word) if self._word else self._blank
        self._word = ""
        self._end_line()
        return out

    def _placed(self, word: str) -> str:
        blank, self._blank = self._blank, ""
        size = cell_len(blank) + cell_len(word)
        may_break = self._column and not self._code and (blank or cell_len(word[0]) == 2)
        if may_break and self._column + size > self._width():
            blank, size, self._column = "\n", cell_len(word), 0
        self._column += size
        if len(self._line) < 3:
            self._line += word
        return blank + word

    def _end_line(self) -> None:
        if self._line.startswith("```"):
            self._code = not self._code
        self._line, self._blank, self._column = "", "", 0
