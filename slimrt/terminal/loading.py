"""From load settings to a model that is ready to answer, with what a person wants to see meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from slimrt.gguf import GGUFFile
from slimrt.hub import resolve
from slimrt.llm import LLM
from slimrt.terminal.guard import note
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar

__all__ = ["find_model", "load_model", "open_file"]


def find_model(name: str | None) -> Path:
    """The model's file, fetched first where it is not there yet."""
    with progress_bar(f"fetching {name or 'the default model'}", unit="bytes") as progress:
        return resolve(name, progress)


def open_file(name: str | None) -> GGUFFile:
    """The model's metadata and mapped tensors."""
    return GGUFFile(find_model(name))


def load_model(settings: LoadSettings, announce: Callable[[GGUFFile], None] | None = None) -> LLM:
    """The model, loaded; ``announce`` is called with its file before anything large is allocated."""
    file = open_file(settings.model)
    if announce is not None:
        announce(file)
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    del options["model"]
    with progress_bar("loading") as progress:
        llm = LLM(file, progress=progress, **options)
    for text in llm.notes:
        note(text)
    return llm
