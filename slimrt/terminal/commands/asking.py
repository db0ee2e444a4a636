"""Commands that ask a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from slimrt.terminal.options import (
    AnswerSettings,
    LoadSettings,
    Size,
    answer_options,
    cache_option,
    file_option,
    force_option,
    json_option,
    load_options,
    model_option,
    user_path,
)

CHAT_MAX_TOKENS, GENERATE_MAX_TOKENS = 1024, 128
CHAT_REPEAT_PENALTY = 1.05  # without it small models soon repeat a sentence for ever


def _read_on_option(told: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--no-read-on", is_flag=True, help=told)


@click.command()
@click.argument("prompt", required=False)
@file_option("A document; PROMPT follows it as the question.")
@click.option("--chat", is_flag=True, help="Put the text through the chat template, as a message.")
@click.option("--system", metavar="TEXT", help="System prompt; implies --chat.")
@answer_options(max_tokens=GENERATE_MAX_TOKENS)
@load_options
@cache_option
@_read_on_option(
    "Leave nothing to a process in the background, which reads what cuts left unread, for further questions."
)
@json_option
def generate(
    prompt: str | None, file: Path | None, chat: bool, system: str | None, answer: AnswerSettings, load: LoadSettings,
    no_read_on: bool, as_json: bool,
) -> None:  # fmt: skip
    """Continue PROMPT, or answer it (--chat).

    A text piped into standard input is the document, as --file is, and PROMPT the question after it; without PROMPT
    (or with -) it is the prompt. The answer goes to stdout as it comes, what it cost to stderr.

    \b
    slimrt generate "Three uses of a brick:" --max-tokens 60
    slimrt generate --chat --file report.txt "What does the report recommend?"
    git diff | slimrt generate --chat "What does this change do?"
    """
    from slimrt.terminal.text_input import checked_argument, prompt_text, size_limit

    text = prompt_text(prompt, file, size_limit(load.ctx))
    if system is not None:
        checked_argument(system, "--system")
    from slimrt.terminal import generate as command

    chat = chat or system is not None
    command.generate(text, load, answer, chat=chat, system=system, as_json=as_json, reads_on=not no_read_on)


@click.command()
@file_option("A document to read first, as /load does.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@answer_options(max_tokens=CHAT_MAX_TOKENS, repeat_penalty=CHAT_REPEAT_PENALTY)
@load_options
@cache_option
@_read_on_option("Do not read what cuts left unread of a document while waiting for a message.")
@json_option
def chat(
    file: Path | None, system: str | None, answer: AnswerSettings, load: LoadSettings, no_read_on: bool, as_json: bool
) -> None:
    """Talk to a model.

    /help lists the commands: /load FILE reads a document. From a pipe each line is a message, and stdout gets the
    answers alone.
    """
    from slimrt.terminal.chat_start import start_chat

    start_chat(file, system, answer, load, as_json=as_json, reads_on=not no_read_on)


@click.command(short_help="Answer every line of a file of requests.")
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option("--template", metavar="TEXT", help="Lines are rows: the prompt, with {column} where a column goes.")
@click.option("--file-column", metavar="COLUMN", help="Lines are rows: the column that names each one's document.")
@click.option("--system", metavar="TEXT", help="System prompt of every row.")
@click.option("--ray", metavar="ADDRESS", help="Answer on the Ray cluster there (host:port, auto, local).")
@click.option("--workers", type=click.IntRange(1), help="Of the cluster.  [one a node, or one a GPU]")
@answer_options(max_tokens=GENERATE_MAX_TOKENS)
@force_option
@load_options
@json_option
def batch(load: LoadSettings, answer: AnswerSettings, as_json: bool, **settings: Any) -> None:
    """Answer every line of SOURCE into TARGET (JSON lines, as OpenAI's batches).

    Prompts that begin alike are answered one after the other, so that a document is read once. A run that was stopped,
    even killed, goes on when the same command is given again. With --template or --file-column lines are rows of any
    columns, and the answers' options hold for all.

    \b
    slimrt batch requests.jsonl answers.jsonl
    slimrt batch rows.jsonl answers.jsonl --file-column path \\
        --template "What does {author} recommend?"
    """
    from slimrt.terminal import batching

    batching.batch(batching.BatchSettings(**settings), load, answer, as_json=as_json)


@click.command(short_help="Write texts as vectors.")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@file_option("Texts, one on each line; - is standard input.")
@click.option("--output", "-o", type=user_path, metavar="FILE", help="Where vectors go: JSON lines, or .npy.  [stdout]")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last", "cls"]),
    default="mean",
    show_default=True,
    help="The mean over a text's tokens, or its last or first one's.",
)
@click.option("--no-normalize", is_flag=True, help="Leave vectors at their own lengths.  [length 1]")
@force_option
@load_options
def embed(load: LoadSettings, no_normalize: bool, **settings: Any) -> None:
    """Write each TEXT as a vector of the model's last hidden states, as JSON lines or a NumPy file.

    \b
    slimrt embed "a text" "another"
    slimrt embed --file lines.txt -o vectors.npy
    """
    from slimrt.terminal import embedding

    embedding.embed(embedding.EmbedSettings(normalize=not no_normalize, **settings), load)


@click.command(short_help="Answer over HTTP, as OpenAI's and Anthropic's servers do.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@click.option("--api-key", metavar="KEY", envvar="SLIMRT_API_KEY", help="What clients must send.  [nothing]")
@click.option("--sessions", type=click.IntRange(1), help="Requests answered at once.  [4, as memory allows]")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option("--max-body", type=Size(), default=32 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--grace", type=click.FloatRange(0), default=10, show_default=True, help="Seconds to end answers when told to stop."
)
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="Let web pages of ORIGIN ask; repeatable.")
@load_options
@cache_option
def serve(load: LoadSettings, **settings: Any) -> None:
    """Answer over HTTP, as OpenAI's and Anthropic's servers do, and on a page to chat.

    \b
    slimrt serve --model model.gguf --ctx 32k
    then: base_url="http://127.0.0.1:8080/v1" in a client
    or open http://127.0.0.1:8080 to chat
    """
    from slimrt.terminal import serving

    serving.serve(load, serving.ServeSettings(**settings))


@click.command()
@click.argument("text", required=False)
@file_option("The text.")
@model_option
@click.option("--special", is_flag=True, help="Control tokens spelt in the text count as such.")
@click.option("--no-bos", is_flag=True, help="No begin token, whatever the model wants.")
@click.option("--pieces", is_flag=True, help="A table of ids and texts.")
@click.option("--count", is_flag=True, help="The number of tokens only.")
@click.option("--decode", is_flag=True, help="The other way round: TEXT is ids.")
@json_option
def tokenize(text: str | None, file: Path | None, model: str | None, as_json: bool, **how: bool) -> None:
    """Turn TEXT (- or nothing: standard input) into token ids."""
    from slimrt.terminal.text_input import prompt_text

    source = prompt_text(text, file)
    from slimrt.terminal import models

    models.tokenize(source, model, as_json=as_json, **how)
