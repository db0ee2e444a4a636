"""From load settings to a model that is ready to answer, with what a person wants to see meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slimrt.hub.store import resolve
from slimrt.llm import LLM
from slimrt.memory.plan import plan
from slimrt.models import read_config
from slimrt.opening import context_of
from slimrt.ops.backend import find_gpu, uses_kernels
from slimrt.output import human_bytes
from slimrt.terminal.guard import note
from slimrt.terminal.options import LoadSettings
from slimrt.terminal.progress import progress_bar
from slimrt.terminal.screen import printable
from slimrt.weights.gguf import GGUFFile

__all__ = ["announce_memory", "find_model", "load_model", "open_file"]


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
    with progress_bar("loading") as progress:
        llm = LLM(file, settings, progress=progress)
    for text in llm.notes:
        note(text)
    return llm


def announce_memory(load: LoadSettings, say: Callable[[str], None]) -> Callable[[GGUFFile], None]:
    """For ``load_model``: ``say`` what the model will take, before it takes it. Nothing is said where a GPU computes:
    what fits there is found with the card at hand, while the model is loaded."""

    def announce(file: GGUFFile) -> None:
        if find_gpu(load.device)[0] is not None:
            return
        config = read_config(file)
        ctx = context_of(load, config)
        fast = uses_kernels(load.device)
        needs = plan(config, file, ctx, threads=load.threads, fast=fast, kv_budget=load.kv_budget)
        behind = f" and {human_bytes(needs.kv_host)} behind the budget" if needs.kv_host else ""
        room = "" if needs.available is None else f" of {human_bytes(needs.available)} free"
        say(
            f"{printable(config.name)} · context {ctx:,} tokens\n"
            f"memory up to {human_bytes(needs.total)}{room}: weights {human_bytes(needs.weights)}, "
            f"keys and values {human_bytes(needs.kv)}{behind}, hidden states {human_bytes(needs.boundary)}, "
            f"scratch {human_bytes(needs.scratch)}, the program itself {human_bytes(needs.runtime)}"
        )

    return announce
