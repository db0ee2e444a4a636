"""What of an answer in gpt-oss's channels its reader wants: an answer is a chain of messages, each with a header that
names its channel (https://github.com/openai/harmony).

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

The channel ``analysis`` is the model's thoughts, and is left out; ``commentary`` and ``final`` are the answer. A
message to a recipient (``to=functions.f``) is a call, and stays as the model wrote it.
"""

from __future__ import annotations

__all__ = ["Channels"]

_CHANNEL, _MESSAGE, _END = "<|channel|>", "<|message|>", "<|end|>"


class Channels:
    """The text of an answer as it comes, without thoughts and headers. An answer that does not begin with a channel
    passes as it is."""

    def __init__(self) -> None:
        self._held = ""  # not decided yet
        self._state = "begin"  # begin, plain, header, shown, hidden or whole

    def push(self, text: str) -> str:
        """What of ``text``, and of what was held back, is to be seen."""
        self._held += text
        seen = ""
        while True:
            before = self._state
            seen += self._step()
            if self._state == before:
                return seen

    def finish(self) -> str:
        """What was held back at the end of the answer."""
        held, self._held = self._held, ""
        return held if self._state in ("begin", "plain", "shown", "whole") else ""

    def _step(self) -> str:
        if self._state == "begin":
            if self._held.startswith(_CHANNEL):
                self._state = "header"
            elif not _CHANNEL.startswith(self._held):
                self._state = "plain"
            return ""
        if self._state == "plain":
            return self._take(len(self._held))
        if self._state == "header":
            at = self._held.find(_MESSAGE)
            if at < 0:
                return ""
            header = self._take(at + len(_MESSAGE))
            name = header.partition(_CHANNEL)[2].removesuffix(_MESSAGE).split()
            if any(word.startswith("to=") for word in header.replace(_CHANNEL, " ").split()):
                self._state = "whole"
                return header
            self._state = "hidden" if name[:1] == ["analysis"] else "shown"
            return ""
        return self._body()

    def _body(self) -> str:
        at = self._held.find(_END)
        if at < 0:
            # What may become the end is held back.
            kept = next((n for n in range(len(_END) - 1, 0, -1) if self._held.endswith(_END[:n])), 0)
            text = self._take(len(self._held) - kept)
            return "" if self._state == "hidden" else text
        text, end, state = self._take(at), self._take(len(_END)), self._state
        self._state = "header"
        return {"hidden": "", "shown": text, "whole": text + end}[state]

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken
