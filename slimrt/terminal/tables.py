"""Tables on stdout: what is in a model, what it needs, which models are there, what a text is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimrt.hub.store import LocalModel
from slimrt.hub.suggested import SuggestedModel
from slimrt.output import human_bytes
from slimrt.terminal.screen import printable
from slimrt.weights.gguf import TensorInfo
from slimrt.weights.outline import ListedTensor

__all__ = ["print_model", "print_models", "print_pieces", "print_suggested", "print_wide"]

_LONG_VALUE = 60  # characters of a metadata value that are shown
_PIPE_WIDTH = 1000  # in a pipe a row is a line


def print_model(
    about: Mapping[str, Any],
    keys: Mapping[str, Any],
    tensors: Sequence[TensorInfo | ListedTensor],
    *,
    metadata: bool,
) -> None:
    """What ``slimrt.inspect.describe`` found, in sections; on request every metadata key; ``tensors`` one by one."""
    _print(_pairs("Model", _model_rows(about)))
    types = [
        (name, f"{entry['tensors']:,}", f"{entry['parameters']:,}", human_bytes(entry["bytes"]))
        for name, entry in about["tensor_types"].items()
    ]
    _print(_table("Tensors", ("type", "tensors", "parameters", "size"), types, right=(1, 2, 3)))
    _print(_pairs("Backend", [(about["backend"]["name"], about["backend"]["why"])]))
    if about["memory"]:
        rows = [(row["part"], human_bytes(row["nbytes"]), row["note"]) for row in about["memory"]["rows"]]
        ctx, trained = about["memory"]["ctx"], about["context_length"]
        beyond = f", beyond the {trained:,} trained on" if trained and ctx > trained else ""
        _print(_table(f"Memory at --ctx {ctx:,}{beyond}", ("", "size", ""), rows, right=(1,)))
    if metadata:
        _print(_pairs("Metadata", [(key, _short(value)) for key, value in keys.items()]))
    if tensors:
        listed = [(t.name, t.type.name, " x ".join(map(str, t.shape)), human_bytes(t.nbytes)) for t in tensors]
        _print(_table("All tensors", ("name", "type", "shape (rows first)", "size"), listed, right=(3,)))
    if about["problem"]:
        _print(Text(f"slimrt cannot run this model: {printable(about['problem'])}", style="red"))
        if (runs := ", ".join(about["supported"])) not in about["problem"]:
            _print(Text(f"slimrt runs {runs}"))


def print_models(models: Sequence[LocalModel]) -> None:
    """The models that are there without fetching; each file's path in a line of its own, to be copied."""
    for model in models:
        click.echo(f"{printable(model.name)}  ({human_bytes(model.size)})\n  {printable(str(model.path))}")


def print_suggested(models: Sequence[SuggestedModel]) -> None:
    """Models that may be fetched: what they are good for, what they take, and the name to copy."""
    if models:
        click.echo("\nWorth fetching (slimrt pull NAME, or --model NAME):")
    for model in models:
        click.echo(
            f"{model.title}: {model.use}; {model.size / 1e9:.1f} GB, memory at 8k about {model.memory / 1e9:.1f} GB\n"
            f"  {model.name}"
        )


def print_pieces(rows: Iterable[tuple[int, str]]) -> None:
    """Token ids with their texts, in quotes. Line by line: there may be a million, and a table measures them all."""
    click.echo("\n".join(f"{id:>8}  '{printable(text)}'" for id, text in rows))


def print_wide(table: Table | Text) -> None:
    """A table made elsewhere, its caption as wide as the terminal; in a pipe nothing is folded."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    caption = table.caption if isinstance(table, Table) else None
    if isinstance(table, Table):
        table.caption = None
    with console.capture() as text:
        console.print(table)
        if caption is not None:
            console.print(caption, style="table.caption", highlight=False)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def _model_rows(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes, rope, tokenizer = about["sizes"], about["rope"], about["tokenizer"]
    rows = [
        ("name", about["name"] or "(none)"),
        ("file", about["file"]["path"]),
        ("size", f"{human_bytes(about['file']['bytes'])}, GGUF version {about['file']['gguf_version']}"),
        ("license", about["license"] or "(not stated)"),
        ("architecture", (about["architecture"] or "(none)") + (f", {about['kind']}" if about["kind"] else "")),
        ("parameters", _parameters(about["parameters"], about["bits_per_weight"])),
        ("type", about["file_type"] or "(not stated)"),
        (
            "trained context",
            "(not stated)" if about["context_length"] is None else f"{about['context_length']:,} tokens",
        ),
    ]
    if sizes:
        rows += [
            ("layers", f"{sizes['layers']} of width {sizes['width']:,}, feed-forward {sizes['feed_forward']:,}"),
            ("attention", f"{sizes['heads']} heads of {sizes['head_width']}, {sizes['kv_heads']} for keys and values"),
            ("output", "shares the embedding" if sizes["tied_output"] else "a matrix of its own"),
        ]
    if rope:
        stretch = "" if rope["scaling"] == "none" else f", {rope['scaling']} x {rope['factor']:g}"
        rows.append(("RoPE", f"base {rope['base']:,g}{stretch}"))
    if tokenizer["model"]:
        pre = f" ({tokenizer['pre']})" if tokenizer["pre"] else ""
        rows.append(("tokenizer", f"{tokenizer['model']}{pre}, {tokenizer['tokens'] or 0:,} tokens"))
    named = f", and by name: {', '.join(about['chat_templates'])}" if about["chat_templates"] else ""
    rows.append(("chat template", ("yes" if about["chat_template"] else "no") + named))
    return rows


def _parameters(count: int, bits: float | None) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.3g}{unit}, {bits:.2f} bits each"
    return f"{count:,}" + (f", {bits:.2f} bits each" if bits else "")


def _short(value: Any) -> str:
    """One line of a metadata value: the beginning of a long text or array, and how much there is."""
    if isinstance(value, (list, np.ndarray)):
        shown = ", ".join(map(str, value[:4]))
        count = math.prod(value.shape) if isinstance(value, np.ndarray) else len(value)
        return f"{count:,} values: {_cut(shown)}{', ...' if count > 4 else ''}"
    return _cut(repr(value) if isinstance(value, str) and "\n" in value else str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONG_VALUE else text[:_LONG_VALUE] + "..."


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    return _table(title, ("", ""), rows)


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=any(headers),
    )
    for column, header in enumerate(headers):
        table.add_column(header, justify="right" if column in right else "left", overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _print(what: Table | Text) -> None:
    print_wide(what)
    if isinstance(what, Table) and what.title:
        click.echo()
