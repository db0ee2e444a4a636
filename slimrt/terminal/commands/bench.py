"""The group ``slimrt bench``: speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimrt.terminal.options import (
    LazyChoice,
    LoadSettings,
    Size,
    device_option,
    file_option,
    force_option,
    json_option,
    kv_budget_option,
    lengths_option,
    load_options,
    model_option,
    repeats_option,
    shape_option,
    threads_option,
    user_path,
)

_output_option = click.option(
    "--output", "-o", type=user_path, metavar="FILE.json", help="Write the report with every run."
)


@click.group()
def bench() -> None:
    """Measure speed."""


@bench.command("serve")
@click.option("--length", type=Size(), default=8000, show_default=True, help="Tokens of the long prompt.")
@click.option(
    "--clients",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    help="So many at once; repeatable.",
)
@click.option("--prompt", type=Size(), default=256, show_default=True, help="Tokens of each one's prompt.")
@click.option(
    "--decode-tokens",
    "tokens",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Tokens of each one's answer.",
)
@click.option(
    "--llama-server", type=user_path, metavar="PATH", help="Measure llama.cpp's server beside it: its program."
)
@repeats_option(3)
@load_options
@_output_option
@force_option
@json_option
def serve_clients(
    load: LoadSettings, llama_server: Path | None, repeats: int, output: Path | None, force: bool, as_json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """What several clients of one server get.

    How long a stream stands still while another client's long prompt is read, and tokens a second of several clients.
    Beside --llama-server both are servers of their own, asked over HTTP in turns, --repeats times.
    """
    from slimrt.terminal import benchmark

    benchmark.bench_serve(load, settings, llama_server, repeats, output, force=force, as_json=as_json)


@bench.command()
@model_option
@lengths_option(512, 2048, 4096, 8000)
@click.option(
    "--prune",
    "plans",
    multiple=True,
    default=("off",),
    show_default=True,
    metavar="auto|fast|off|PLAN.json",
    help="A plan to measure; repeatable.",
)
@click.option(
    "--vs",
    multiple=True,
    metavar="llama_cpp|llama_cpp_best|openvino",
    help="Another program to measure beside it; best: on its fastest format; repeatable.",
)
@repeats_option(3)
@click.option("--decode-tokens", type=click.IntRange(0), default=32, show_default=True, help="Tokens generated a run.")
@click.option(
    "--follow-up",
    type=click.IntRange(0),
    default=0,
    metavar="TOKENS",
    help="Then ask a further question of so many tokens.  [none]",
)
@click.option(
    "--questions",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many of them, one after the other.",
)
@kv_budget_option
@device_option
@threads_option
@file_option("Text of the prompts.  [Python's documentation]")
@click.option("--png", type=user_path, metavar="FILE.png", help="Draw time to first token over prompt length.")
@_output_option
@click.option(
    "--library", is_flag=True, help="What the library of documents saves at the longest --length, in new processes."
)
@force_option
@json_option
def ttft(model: str | None, file: Path | None, library: bool, as_json: bool, **settings: Any) -> None:
    """Time to first token and decode speed.

    All programs read the same token ids, in processes of their own, taking turns.

    \b
    slimrt bench ttft --length 4k --prune off --prune auto --vs llama_cpp
    """
    from slimrt.terminal import benchmark

    how = benchmark.bench_library if library else benchmark.bench_ttft
    how(model, benchmark.BenchSettings(text=file, **settings), as_json=as_json)


@bench.command(short_help="What guesses at the next tokens bring.")
@model_option
@click.option("--draft", default="auto", show_default=True, metavar="auto|lookup|MODEL", help="Who guesses.")
@click.option("--tokens", type=Size(), default=128, show_default=True, help="Tokens of each text.")
@repeats_option(5)
@threads_option
@json_option
def draft(model: str | None, draft: str, tokens: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """What guesses at the next tokens bring, on text that repeats and text that does not."""
    from slimrt.terminal import benchmark

    load = LoadSettings(model=model, prune="off", threads=threads, draft=draft)
    benchmark.bench_draft(load, tokens, repeats, as_json=as_json)


@bench.command(short_help="What a schema or a grammar costs a token.")
@model_option
@click.option("--tokens", type=Size(), default=400, show_default=True, help="Tokens of each grammar.")
@threads_option
@json_option
def structured(model: str | None, tokens: int, threads: int | None, as_json: bool) -> None:
    """What a schema or a grammar costs a token, beside the model's own time for one."""
    from slimrt.terminal import benchmark

    benchmark.bench_structured(LoadSettings(model=model, prune="off", threads=threads), tokens, as_json=as_json)


@bench.command()
@device_option
@shape_option
@click.option("--tokens", type=Size(), default=2048, show_default=True, help="Rows of a prompt.")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="An operation to measure; repeatable.  [all]")
@repeats_option(5)
@threads_option
@json_option
def kernels(as_json: bool, **settings: Any) -> None:
    """Speed of every operation, against the roofline of the machine.

    Random weights and rows of the sizes of a known model; needs no model.

    \b
    slimrt bench kernels --shape llama-3.1-8b --tokens 16k --device cuda
    """
    from slimrt.terminal import benchmark

    benchmark.bench_kernels(benchmark.KernelSettings(**settings), as_json=as_json)


@bench.command()
@device_option
@shape_option
@click.option("--type", "kind", default="Q4_0", show_default=True, help="Type of the matrices, such as F16 or Q8_0.")
@lengths_option(2048, 4096)
@click.option(
    "--prune",
    "plans",
    multiple=True,
    default=("off",),
    show_default=True,
    type=LazyChoice("slimrt.bench.shaped", "PLANS"),
    help="A plan to measure; repeatable.",
)
@kv_budget_option
@repeats_option(1)
@click.option("--decode-tokens", type=click.IntRange(0), default=16, show_default=True, help="Tokens decoded a run.")
@threads_option
@json_option
def shape(as_json: bool, **settings: Any) -> None:
    """Time to first token of a known model's shape, random weights.

    Needs no model file. On a GPU it also tells how much of the copying to and from host memory hides behind compute.

    \b
    slimrt bench shape --shape llama-3.1-8b --type Q4_0 --length 32k \\
        --prune off --prune 8k/4k/2k --device cuda
    """
    from slimrt.terminal import benchmark

    benchmark.bench_shape(benchmark.ShapeSettings(**settings), as_json=as_json)
