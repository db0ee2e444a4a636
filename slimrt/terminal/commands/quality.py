"""Commands about what pruning costs, keeps and could be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimrt.terminal.options import (
    LoadSettings,
    Size,
    ctx_option,
    device_option,
    force_option,
    json_option,
    lengths_option,
    load_options,
    model_option,
    seed_option,
    text_option,
    threads_option,
    user_path,
)


@click.command("eval")
@model_option
@click.option(
    "--prune",
    "plans",
    multiple=True,
    metavar="auto|fast|PLAN.json",
    help="A plan to compare with the dense run; repeatable.  [auto and fast, or --kv-budget alone]",
)
@click.option(
    "--kv-budget", type=Size(), metavar="ROWS", help="Compare decode that reads so many rows a layer as well."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    default=("all",),
    show_default=True,
    metavar="NAME",
    help="A task, or the group text, shapes, ruler or all; repeatable.",
)
@lengths_option(2000)
@click.option("--samples", type=click.IntRange(1), default=10, show_default=True, help="Prompts a task and length.")
@seed_option
@text_option
@click.option(
    "--ttft-repeats",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Time the first token so often a plan and length; 0: not at all.",
)
@click.option("--output", "-o", type=user_path, metavar="FILE.json", help="Write the report with every value.")
@click.option("--png", type=user_path, metavar="FILE.png", help="Draw quality against time to first token.")
@click.option(
    "--report",
    "reports",
    type=user_path,
    multiple=True,
    metavar="FILE.json",
    help="Measure nothing, show what -o wrote; several: together; repeatable.",
)
@force_option
@ctx_option
@device_option
@threads_option
@json_option
def evaluate(
    model: str | None, ctx: int | None, device: str, threads: int | None, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Measure what pruning costs in quality and saves in time.

    Every plan answers the same prompts as the dense run: questions in many shapes, RULER's tasks, text quoted and
    continued. Differences come with 95 % intervals (paired bootstrap). Long evaluations are best run in parts, each
    with a seed of its own and -o, and shown together with --report.

    \b
    slimrt eval --task text --length 4000 --prune fast --prune mine.json
    """
    from slimrt.terminal import evaluation

    load = LoadSettings(model=model, ctx=ctx, device=device, prune="off", threads=threads)
    evaluation.evaluate(evaluation.EvalSettings(**settings), load, as_json=as_json)


@click.command(short_help="Find a model's fastest prune plans within a stated loss.")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--max-kl", type=click.FloatRange(0), default=0.05, show_default=True, help="Mean KL to dense, nats.")
@click.option("--max-recall-drop", type=click.FloatRange(0), default=0.01, show_default=True, help="Of 1.")
@click.option("--max-nll-rise", type=click.FloatRange(0), default=0.02, show_default=True, help="Nats a token.")
@click.option("--max-answer-loss", type=click.FloatRange(0), default=0.3, show_default=True, help="Nats an answer.")
@click.option("--length", type=Size(), default=3000, show_default=True, help="Tokens of a prompt.")
@click.option("--samples", type=click.IntRange(8), default=48, show_default=True, help="Prompts in all.")
@seed_option
@text_option
@click.option("--output", "-o", type=user_path, metavar="FILE.slim.json", help="Where presets go.  [beside the model]")
@force_option
@threads_option
@json_option
def calibrate(model: str | None, threads: int | None, as_json: bool, **settings: Any) -> None:
    """Find the fastest prune plans of a model within a stated loss of quality.

    Measures candidates against the dense run on text quoted and continued and on questions in many shapes, and writes
    the presets auto (within the bounds, no answer 2 nats worse) and fast (twice the recall drop, four times the KL and
    nats, 2.7 times the answers' loss) to MODEL.slim.json, which --prune then uses. What is reported was measured on
    text that no choice was made by.
    A calibration that was stopped goes on where it stopped when the same command is given again.

    \b
    slimrt calibrate model.gguf --max-kl 0.05 --max-recall-drop 0.01
    """
    from slimrt.terminal import calibrating

    load = LoadSettings(model=model, prune="off", threads=threads)
    calibrating.calibrate_model(calibrating.CalibrateSettings(**settings), load, as_json=as_json)


@click.command()
@click.option("--file", "-f", type=user_path, required=True, metavar="FILE", help="A document, UTF-8.")
@click.option("--question", "-q", required=True, metavar="TEXT", help="What is asked about it.")
@click.option("--output", "-o", type=user_path, default="explain.html", show_default=True, help="The page.")
@click.option("--plain", is_flag=True, help="Do not put the text through the chat template.")
@click.option("--compare", is_flag=True, help="Read it without cuts as well, and show what that run attended to.")
@force_option
@load_options
@json_option
def explain(
    file: Path, question: str, output: Path, plain: bool, compare: bool, force: bool, load: LoadSettings, as_json: bool
) -> None:
    """Show which parts of a document pruning kept for a question.

    Writes one HTML page: the prompt shaded block by block, tokens, time and memory layer by layer. A summary goes to
    stdout.

    \b
    slimrt explain --file report.txt --question "What does it recommend?"
    """
    from slimrt.terminal import explaining

    explaining.explain_prompt(file, question, output, load, plain=plain, compare=compare, force=force, as_json=as_json)
