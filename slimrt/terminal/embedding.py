"""``slimrt embed``: texts in, vectors out."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np

from slimrt.errors import SettingError, SlimrtError
from slimrt.llm import LLM
from slimrt.output import check_output, write_atomically
from slimrt.terminal.guard import note
from slimrt.terminal.loading import load_model
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.text_input import read_document

__all__ = ["EmbedSettings", "embed"]


@dataclass(frozen=True)
class EmbedSettings:
    """The texts, or the file whose lines they are, and where their vectors go; as the command's options."""

    texts: tuple[str, ...]
    file: Path | None
    output: Path | None
    pooling: Literal["mean", "last", "cls"]
    normalize: bool
    force: bool


def embed(settings: EmbedSettings, load: LoadSettings) -> None:
    """One JSON object a text on stdout, or all in the file, as .npy [texts, D] float32 where it is called so.

    What cannot be read is refused before the model is loaded, and a text that does not fit before any is read.
    """
    if bool(settings.texts) == (settings.file is not None):
        raise SettingError("embed: no texts, or both texts and --file; give texts, or --file with one on each line")
    texts = list(settings.texts)
    if settings.file is not None:
        texts = read_document(settings.file).splitlines()
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise SettingError(f"text {number}: it is empty, and has no vector; leave it out")
    if settings.output is not None:
        check_output(settings.output, sources=[settings.file] if settings.file else [], force=settings.force)
    llm = load_model(load)
    vectors = _vectors(llm, texts, settings)
    if settings.output is not None and settings.output.suffix == ".npy":
        data = io.BytesIO()
        np.save(data, vectors)
        write_atomically(settings.output, data.getvalue())
    else:
        lines = "".join(
            json.dumps({"index": index, "text": text, "embedding": vector.tolist()}, ensure_ascii=False) + "\n"
            for index, (text, vector) in enumerate(zip(texts, vectors, strict=True))
        )
        if settings.output is None:
            click.echo(lines, nl=False)
            return
        write_atomically(settings.output, lines.encode())
    note(f"{len(texts):,} vectors of {vectors.shape[1]} numbers are in {settings.output}")


def _vectors(llm: LLM, texts: list[str], settings: EmbedSettings) -> np.ndarray:
    prompts = [llm.token_ids(text) for text in texts]
    for number, ids in enumerate(prompts, 1):
        try:
            llm.current.check(ids)
        except SlimrtError as error:
            raise SettingError(f"text {number}: {error}") from None
    with progress_bar("embedding") as progress:
        return llm.embed(prompts, pooling=settings.pooling, normalize=settings.normalize, progress=progress)
