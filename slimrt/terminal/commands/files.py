"""Commands about model files, and the library of documents that were read."""

from __future__ import annotations

from pathlib import Path

import click

from slimrt.terminal.options import (
    LazyChoice,
    ManyChoices,
    ctx_option,
    force_option,
    json_option,
    model_option,
    user_path,
)

output_type = LazyChoice("slimrt.convert", "OUTPUT_TYPES")


@click.command(short_help="Show what is in a model, and the memory that it takes.")
@click.argument("file", required=False, metavar="[MODEL]")
@model_option
@ctx_option
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "numpy"]),
    default="auto",
    is_flag=False,
    flag_value="auto",
    help="What would compute, and why.  [auto]",
)
@click.option("--threads", "-t", type=click.IntRange(1), help="CPU threads that the memory plan counts with.")
@click.option("--metadata", is_flag=True, help="Every metadata key.")
@click.option("--tensors", is_flag=True, help="Every tensor.")
@json_option
def inspect(
    file: str | None,
    model: str | None,
    ctx: int | None,
    device: str,
    threads: int | None,
    metadata: bool,
    tensors: bool,
    as_json: bool,
) -> None:
    """Show what is in MODEL, the memory that a context of --ctx takes, and what would compute it."""
    if file is not None and model is not None:
        raise click.UsageError("MODEL and --model both name a model; give one")
    from slimrt.terminal import models

    models.inspect(file or model, ctx, device, threads, metadata=metadata, tensors=tensors, as_json=as_json)


@click.command(short_help="Fetch a model, or list those worth fetching.")
@click.argument("name", required=False, metavar="[MODEL]")
@click.option("--list", "listing", is_flag=True, help="Show what is there and its size; fetch nothing.")
@click.option("--force", is_flag=True, help="Fetch even what is there.")
@json_option
def pull(name: str | None, listing: bool, force: bool, as_json: bool) -> None:
    """Fetch MODEL (hf:owner/repo/file.gguf or a catalogue name), or check what is there; print its path."""
    from slimrt.terminal import models

    if listing and name is not None:
        raise click.UsageError("--list shows all models; leave MODEL out")
    if listing:
        models.list_models(as_json=as_json)
    else:
        models.pull(name, force=force, as_json=as_json)


@click.command(short_help="Make a GGUF file of a Hugging Face or Meta checkpoint.")
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option(
    "--type", "kind", cls=ManyChoices, type=output_type, default="f16", show_default=True, help="Type of the matrices."
)
@click.option("--lora", is_flag=True, help="SOURCE is the folder of a LoRA adapter, as PEFT saves it.")
@click.option(
    "--base", type=user_path, metavar="MODEL", help="What the adapter changes: its folder or a GGUF file of it."
)
@force_option
@json_option
def convert(
    source: Path, target: Path, kind: str, lora: bool, base: Path | None, force: bool, as_json: bool
) -> None:  # fmt: skip
    """Convert SOURCE, a Hugging Face or Meta checkpoint folder, to the GGUF file TARGET."""
    from slimrt.terminal import models

    if base is not None and not lora:
        raise click.UsageError("--base names the model of an adapter; give --lora too, or leave it out")
    models.convert(source, target, kind, lora=lora, base=base, force=force, as_json=as_json)


@click.command(short_help="Make a GGUF file with matrices of another type.")
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option("--type", "kind", cls=ManyChoices, type=output_type, required=True, help="Type of the matrices.")
@click.option(
    "--imatrix-text",
    type=user_path,
    metavar="FILE",
    help="A text (- is standard input) that the model reads first, to see which weights count: for K-quants.",
)
@force_option
@json_option
def quantize(source: Path, target: Path, kind: str, imatrix_text: Path | None, force: bool, as_json: bool) -> None:
    """Write the GGUF file SOURCE to TARGET with its matrices in another type."""
    from slimrt.terminal import models

    models.quantize(source, target, kind, imatrix_text=imatrix_text, force=force, as_json=as_json)


@click.group(short_help="Documents that were read and are kept on disk.")
def cache() -> None:
    """The library of documents that were read: generate, chat and serve keep them, and do not read them again."""


@cache.command("list")
@json_option
def list_cache(as_json: bool) -> None:
    """Show what is kept: size, tokens, model, last use and first words."""
    from slimrt.terminal import library

    library.list_library(as_json=as_json)


@cache.command("clear")
@json_option
def clear_cache(as_json: bool) -> None:
    """Delete all that is kept."""
    from slimrt.terminal import library

    library.clear_library(as_json=as_json)
