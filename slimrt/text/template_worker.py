"""The process in which chat templates are compiled and run; ``template_process`` starts it and talks to it.

A template is a program that comes with a model file, from anybody. Its budget (see the sandbox) ends the usual excesses
with a reason; whatever gets past the budget meets the limits of this process: memory and processor time, set again for
each rendering by the operating system where it can.

A request is its length (8 bytes, little-endian) and a marshalled (source, variables, characters): variables None only
compiles, ``characters`` is how many the messages have, which the marshalled ones may share. An
answer is a letter, a length and so many bytes: T and the text in UTF-8, or P and JSON with ``problem``, a kind, and
``why``. Nothing that comes back is unmarshalled: what a template did to this process must not reach the other one.
"""

from __future__ import annotations

import json
import marshal
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import jinja2

_MEMORY = 256 << 20  # bytes that a template may take beside what the process itself and its messages do
_PER_BYTE = 24  # and for each byte or character of the messages, of which there are copies of up to 4 bytes
_SECONDS = 2  # of processor time, rounded up; the budget ends most excesses after one
_BYTES_A_SECOND = 8 << 20  # and a second for so many bytes of messages
_CACHED = 16  # compiled templates

_Answer = str | dict[str, Any]  # the text, or what went wrong


class _Limits:
    """What the system holds this process to; nothing where it has no such limits (Windows), less memory on macOS."""

    def __init__(self) -> None:
        try:
            import resource
        except ImportError:
            self._resource: Any = None
            return
        self._resource = resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            with open("/proc/self/statm") as file:  # noqa: PTH123  # pathlib is slow to import
                self._base = int(file.read().split()[0]) * resource.getpagesize()
        except OSError:
            self._base = 0  # unknown: no limit can be set

    def apply(self, size: int) -> None:
        """For a request of ``size`` bytes or characters."""
        if self._resource is None:
            return
        resource = self._resource
        seconds = int(time.process_time()) + 1 + _SECONDS + size // _BYTES_A_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        if self._base:
            most = self._base + _MEMORY + _PER_BYTE * size
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


class _Renderer:
    def __init__(self) -> None:
        from slimrt.text.sandbox import ChatEnvironment

        self._environment = ChatEnvironment()
        self._compiled: dict[str, jinja2.Template] = {}

    def answer(self, source: str, variables: dict[str, Any] | None, characters: int) -> _Answer:
        import jinja2

        from slimrt.text.sandbox import RefusalError
        from slimrt.text.template_budget import BUDGET, Budget, BudgetError

        try:
            template = self._template(source)
        except jinja2.TemplateSyntaxError as error:
            return {"problem": "syntax", "why": str(error), "line": error.lineno}
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            return {"problem": "compile", "why": str(error)}
        if variables is None:
            return ""
        try:
            return template.render(variables | {BUDGET: Budget(characters)})
        except RefusalError as error:
            return {"problem": "refused", "why": str(error)}
        except BudgetError as error:
            return {"problem": "stopped", "why": str(error)}
        except MemoryError:
            return {"problem": "memory", "why": ""}
        # The template is a program of unknown origin: any error of Python's operations may come out of it.
        except Exception as error:
            return {"problem": "failed", "why": f"{type(error).__name__}: {error}"}

    def _template(self, source: str) -> jinja2.Template:
        template = self._compiled.get(source)
        if template is None:
            template = self._environment.bounded(source)
            if len(self._compiled) >= _CACHED:
                self._compiled.clear()
            self._compiled[source] = template
        return template


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer ``requests`` until they end."""
    renderer, limits = _Renderer(), _Limits()
    while len(head := requests.read(8)) == 8:
        size = int.from_bytes(head, "little")
        limits.apply(size)
        try:
            source, variables, characters = marshal.loads(requests.read(size))
            limits.apply(max(size, characters))
            answer = renderer.answer(source, variables, characters)
            kind = b"T" if isinstance(answer, str) else b"P"
            raw = answer.encode(errors="surrogatepass") if isinstance(answer, str) else json.dumps(answer).encode()
        except MemoryError:
            kind, raw = b"P", b'{"problem": "memory", "why": ""}'
        answers.write(kind + len(raw).to_bytes(8, "little"))
        answers.write(raw)
        answers.flush()


def main() -> None:
    """``argv[1]``: JSON of the module path of the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle
    sys.path[:] = json.loads(sys.argv[1])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but answers goes to the pipe
    serve(requests, answers)


if __name__ == "__main__":
    main()
