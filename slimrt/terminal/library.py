"""``slimrt cache``: what the library of documents holds, and emptying it."""

from __future__ import annotations

import datetime
import json

import click
from rich.table import Table
from rich.text import Text

from slimrt.library.store import Library, library_folder
from slimrt.output import counted, human_bytes
from slimrt.terminal.guard import note
from slimrt.terminal.screen import printable
from slimrt.terminal.tables import print_wide

__all__ = ["clear_library", "list_library"]


def list_library(*, as_json: bool) -> None:
    """A table, or with ``as_json`` an object, on stdout."""
    library = Library(library_folder())
    books = library.books()
    total = sum(book.nbytes for book in books)
    if as_json:
        entries = [
            {
                "file": str(book.path), "bytes": book.nbytes, "used": book.used, "tokens": book.header.tokens,
                "model": book.header.model, "layers": book.header.layers, "begins": book.header.begins,
            }
            for book in books
        ]  # fmt: skip
        told = {"folder": str(library.folder), "bytes": total, "limit": library.limit, "entries": entries}
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    if books:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, right in (
            ("size", True),
            ("tokens", True),
            ("last used", False),
            ("model", False),
            ("begins", False),
        ):
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for book in books:
            when = datetime.datetime.fromtimestamp(book.used).strftime("%Y-%m-%d %H:%M")
            table.add_row(
                human_bytes(book.nbytes), f"{book.header.tokens:,}", when, Text(printable(book.header.model)[:24]),
                Text(printable(book.header.begins)[:40]),
            )  # fmt: skip
        print_wide(table)
    held = f"{human_bytes(total)} of at most {human_bytes(library.limit)}"
    note(f"{counted(len(books), 'document')}, {held} in {library.folder}")


def clear_library(*, as_json: bool) -> None:
    """Delete everything, and say how much it was."""
    library = Library(library_folder())
    freed = library.clear()
    if as_json:
        click.echo(json.dumps({"folder": str(library.folder), "bytes": freed}))
        return
    note(f"{human_bytes(freed)} freed in {library.folder}")
