"""From the options of ``slimrt chat`` to a running conversation."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from slimrt.terminal.chat import Chat
from slimrt.terminal.line_input import open_input
from slimrt.terminal.loading import announce_memory, load_model
from slimrt.terminal.options import AnswerSettings, LoadSettings
from slimrt.terminal.screen import Screen
from slimrt.terminal.text_input import checked_argument

__all__ = ["start_chat"]


def start_chat(
    file: Path | None,
    system: str | None,
    answer: AnswerSettings,
    load: LoadSettings,
    *,
    as_json: bool,
    reads_on: bool = True,
) -> None:
    """Load the model, talk until the input ends; status 1 if a message from a pipe failed. ``reads_on``: while a person
    reads and writes, what cuts left unread of a document may be read."""
    if system is not None:
        checked_argument(system, "--system")
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    screen = Screen(interactive=interactive, quiet=as_json)
    llm = load_model(load, announce_memory(load, screen.remark) if interactive else None)
    source = open_input(interactive)
    chat = Chat(llm, answer, source, screen, system, reads_on=reads_on and interactive)
    try:
        if file is not None:
            chat.load(shlex.quote(str(file)))
        if interactive:
            screen.remark("Ask away; /load FILE reads a document, /help shows the rest, /quit leaves.")
        chat.run()
    finally:
        source.close()
    if as_json:
        click.echo(json.dumps(chat.to_json(), ensure_ascii=False))
    if chat.failures and not interactive:
        raise click.exceptions.Exit(1)
