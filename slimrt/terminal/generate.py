"""``slimrt generate``: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import functools
import json

import click

from slimrt.terminal.afterwards import read_on
from slimrt.terminal.answer import Begin, cut_note, kept_note, stream_answer
from slimrt.terminal.guard import INTERRUPTED
from slimrt.terminal.loading import announce_memory, load_model
from slimrt.terminal.options import AnswerSettings, LoadSettings
from slimrt.terminal.screen import Screen, stats_line

__all__ = ["generate"]


def generate(
    prompt: str,
    load: LoadSettings,
    answer: AnswerSettings,
    *,
    chat: bool,
    system: str | None,
    as_json: bool,
    reads_on: bool = True,
) -> None:
    """Answer ``prompt`` on stdout: continued as plain text, or (``chat``) as a message through the chat template.
    ``reads_on``: what cuts left unread of a document may be read in the background, for further questions.

    Who asks for a context of some size is told what memory it will take, before it is taken.
    """
    screen = Screen(quiet=as_json)
    llm = load_model(load, announce_memory(load, screen.remark) if load.ctx and not as_json else None)
    begin: Begin
    if chat:
        instructions = [{"role": "system", "content": system}] if system else []
        messages = [*instructions, {"role": "user", "content": prompt}]
        ids = llm.chat_tokens(messages)
        begin = functools.partial(llm.chat, messages, stream=True)
    else:
        ids = llm.tokenize(prompt)
        begin = functools.partial(llm.stream, ids)
    result = stream_answer(begin, len(ids), answer, screen)
    if result.stopped:
        raise click.exceptions.Exit(INTERRUPTED)
    completion = result.completion
    if as_json:
        click.echo(json.dumps({"model": llm.config.name, **dataclasses.asdict(completion)}, ensure_ascii=False))
        if reads_on:
            read_on(llm, llm.current)
        return
    if kept := kept_note(llm):
        screen.remark(kept)
    cut = cut_note(llm, completion, answer)
    screen.remark(stats_line(completion, compiled=result.compiled) + (f" · {cut}" if cut else ""))
    if reads_on and read_on(llm, llm.current):
        screen.remark("the rest of the document is read in the background, so that further questions cost little")
