"""The command ``slimrt``: its commands put together, and the console script.

Whatever is slow to import waits in its command: ``slimrt --help`` must not load NumPy.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

_COMMAND = __name__ == "__main__" or Path(sys.argv[0]).name.startswith("slimrt")
if _COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends the command, without a word

import click  # noqa: E402

from slimrt import __version__  # noqa: E402
from slimrt.terminal.commands import asking, bench, files, quality  # noqa: E402
from slimrt.terminal.guard import GuardedGroup, standard_streams  # noqa: E402


@click.group(
    "slimrt", cls=GuardedGroup, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100}
)
@click.version_option(__version__, "--version", "-V", prog_name="slimrt")
def cli() -> None:
    """Run LLaMA-family GGUF models, without a deep-learning framework.

    With no --model, a small default model is used, and fetched the first time.
    """


for command in (
    asking.generate,
    asking.chat,
    asking.batch,
    asking.embed,
    asking.serve,
    asking.tokenize,
    files.inspect,
    files.pull,
    files.convert,
    files.quantize,
    files.cache,
    quality.evaluate,
    quality.calibrate,
    quality.explain,
    bench.bench,
):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    standard_streams()
    ends_quietly = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli(prog_name="slimrt")
    finally:
        if ends_quietly:  # all is said and done; the interpreter's own end shows tracebacks
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
