"""``slimrt explain``: which blocks of a prompt the model kept, on the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from slimrt.errors import SettingError
from slimrt.explain.report import explain
from slimrt.output import check_output, write_atomically
from slimrt.terminal.guard import note
from slimrt.terminal.loading import load_model
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.text_input import checked_argument, join_document, read_document, size_limit

__all__ = ["explain_prompt"]


def explain_prompt(
    file: Path,
    question: str,
    output: Path,
    load: LoadSettings,
    *,
    plain: bool,
    compare: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Read ``file`` and the question as ``generate`` does, write the page ``output``, print the summary."""
    # Whatever can be refused is refused before the model is loaded.
    if not checked_argument(question, "--question").strip():
        raise SettingError("--question: no text in it; ask something, for pruning keeps what the question needs")
    check_output(output, sources=[file], force=force)
    prompt = join_document(read_document(file, size_limit(load.ctx)), question)
    llm = load_model(load)
    plain = plain or (load.chat_template is None and llm.tokenizer.chat_template is None)
    ids = llm.tokenize(prompt) if plain else llm.chat_tokens([{"role": "user", "content": prompt}])
    with progress_bar(f"reading {len(ids):,} tokens") as progress:
        seen = explain(llm, ids, question=question, progress=progress, against_dense=compare)

    from slimrt.explain.page import html_page

    write_atomically(output, html_page(seen).encode())
    if as_json:
        click.echo(json.dumps({**seen.to_dict(), "page": str(output)}, ensure_ascii=False))
        return
    from slimrt.explain.text import summary
    from slimrt.terminal.tables import print_wide

    for part in summary(seen):
        print_wide(part)
    note(f"the page is {output}")
