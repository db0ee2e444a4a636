"""The command ``slimrt``: its commands put together, and the console script.

Whatever is slow to import waits in its command: ``slimrt --help`` must not load NumPy.
"""

from __future__ import annotations

import click

from slimrt import __version__
from slimrt.terminal.commands import asking, bench, files, quality
from slimrt.terminal.guard import GuardedGroup, standard_streams


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
    cli(prog_name="slimrt")


if __name__ == "__main__":
    main()
