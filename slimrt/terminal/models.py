"""The commands about model files: tokenize, inspect, pull, convert, quantize."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from slimrt.errors import SettingError
from slimrt.output import human_bytes
from slimrt.terminal.loading import find_model, open_file
from slimrt.terminal.progress import progress_bar
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["convert", "inspect", "list_models", "pull", "quantize", "tokenize"]


def tokenize(
    text: str, model: str | None, *, special: bool, no_bos: bool, pieces: bool, count: bool, decode: bool, as_json: bool
) -> None:
    """Text to ids or back; the weights are not loaded."""
    from slimrt.terminal.tables import print_pieces

    given = _ids(text) if decode else None  # a slip is told before the model is opened
    tokenizer = Tokenizer.from_gguf(open_file(model))
    ids = tokenizer.encode(text, special=special, add_bos=False if no_bos else None) if given is None else given
    texts = _pieces(tokenizer, ids) if as_json or pieces else []
    if as_json:
        data = {"count": len(ids), "tokens": ids, "pieces": texts}
        _json({**data, "text": tokenizer.decode(ids, special=special)} if decode else data)
    elif count:
        click.echo(len(ids))
    elif pieces:
        print_pieces(zip(ids, texts, strict=True))
    elif decode:
        click.echo(tokenizer.decode(ids, special=special))
    else:
        click.echo(" ".join(map(str, ids)))


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    r"""The text of each token; bytes that are part of a character only appear as ``\xf0``."""
    return [tokenizer.token_bytes(id, special=True).decode(errors="backslashreplace") for id in ids]


def _ids(text: str) -> list[int]:
    """Numbers between blanks, commas or brackets: what ``tokenize`` prints, with or without --json."""
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise SettingError(f"{word[:40]!r} is not a token id; --decode takes whole numbers, such as 1 42 7")
    return [int(word) for word in words]


def inspect(
    model: str | None,
    ctx: int | None,
    device: str,
    threads: int | None,
    *,
    metadata: bool,
    tensors: bool,
    as_json: bool,
) -> None:
    """The model's contents, memory plan and what would compute."""
    from slimrt.inspect import describe, open_for_inspection
    from slimrt.terminal.tables import print_model
    from slimrt.weights.outline import Outline

    file = open_for_inspection(find_model(model))
    listed = file.listed if isinstance(file, Outline) else file.tensors
    about = describe(file, ctx, device=device, threads=threads)
    if as_json:
        if tensors:
            about["tensors"] = [
                {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes}
                for t in listed.values()
            ]
        if metadata:
            about["metadata"] = {key: _plain(value) for key, value in file.metadata.items()}
        _json(about)
    else:
        print_model(about, file.metadata, list(listed.values()) if tensors else [], metadata=metadata)


def _plain(value: Any) -> Any:
    """A metadata value as JSON knows it; numbers that are not finite become text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def pull(name: str | None, *, force: bool, as_json: bool) -> None:
    """Fetch or check a model; its path goes to stdout."""
    from slimrt.hub import store

    with progress_bar(f"fetching {name or 'the default model'}", unit="bytes") as progress:
        path = store.pull(name, progress, force)
    if as_json:
        _json({"name": name or store.DEFAULT_MODEL, "path": str(path), "bytes": path.stat().st_size})
    else:
        click.echo(path)


def list_models(*, as_json: bool) -> None:
    """What is there without fetching, and what else is worth it."""
    from slimrt.hub import store
    from slimrt.hub.suggested import SUGGESTED
    from slimrt.terminal.tables import print_models, print_suggested

    models = store.models()
    here = {model.name for model in models}
    others = [model for model in SUGGESTED if model.name not in here]
    if as_json:
        _json({
            "models": [{"name": model.name, "path": str(model.path), "bytes": model.size} for model in models],
            "suggested": [dataclasses.asdict(model) for model in others],
        })  # fmt: skip
        return
    if models:
        print_models(models)
    else:
        click.echo("no models yet; 'slimrt pull' fetches the default one", err=True)
    print_suggested(others)


def convert(
    source: Path, target: Path, kind: str, *, lora: bool, base: Path | None, force: bool, as_json: bool
) -> None:
    """A checkpoint folder, or that of an adapter, to GGUF."""
    from slimrt.convert import convert_adapter, convert_checkpoint

    work: Callable[..., None] = partial(convert_adapter, base=base) if lora else convert_checkpoint
    _write("converting", work, source, target, kind, force, as_json)


def quantize(
    source: Path, target: Path, kind: str, *, imatrix_text: Path | None, force: bool, as_json: bool
) -> None:  # fmt: skip
    """A GGUF file to another type, by an importance matrix of a text if there is one."""
    from slimrt.convert import quantize_file

    work: Callable[..., None] = quantize_file
    if imatrix_text is not None:
        from slimrt.convert.mixes import check_takes_importance, parse_type
        from slimrt.importance import measure_importance
        from slimrt.output import check_output
        from slimrt.terminal.text_input import read_document

        # Before the time that reading takes.
        check_output(target, sources=[source], force=force)
        check_takes_importance(parse_type(kind))
        text = read_document(imatrix_text)
        with progress_bar("reading for the importance matrix") as progress:
            measured = measure_importance(GGUFFile(source), text, progress)
        about: dict[str, str | int] = {
            "dataset": imatrix_text.name, "entries_count": len(measured.columns), "chunks_count": measured.pieces,
        }  # fmt: skip
        work = partial(quantize_file, importance=measured.columns, about_importance=about)
    _write("quantising", work, source, target, kind, force, as_json)


def _write(
    label: str, work: Callable[..., None], source: Path, target: Path, kind: str, force: bool, as_json: bool
) -> None:
    with progress_bar(label, unit="bytes") as progress:
        work(source, target, kind, progress, force=force)
    size = target.stat().st_size
    if as_json:
        _json({"source": str(source), "path": str(target), "type": kind, "bytes": size})
    else:
        click.echo(f"{target}: {kind}, {human_bytes(size)}", err=True)


def _json(data: Any) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))
