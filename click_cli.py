"""The command ``slimrt``: parse options -> frozen settings -> one call.

Whatever is slow to import waits in its command: ``slimrt --help`` must not load NumPy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from slimrt import __version__
from slimrt.terminal.guard import GuardedGroup, standard_streams
from slimrt.terminal.options import (
    AnswerSettings,
    LazyChoice,
    LoadSettings,
    Size,
    answer_options,
    cache_option,
    ctx_option,
    device_option,
    file_option,
    force_option,
    json_option,
    kv_budget_option,
    load_options,
    model_option,
    repeats_option,
    shape_option,
    threads_option,
    user_path,
)

CHAT_MAX_TOKENS, GENERATE_MAX_TOKENS = 1024, 128
CHAT_REPEAT_PENALTY = 1.05  # without it small models soon repeat a sentence for ever
output_type = LazyChoice("slimrt.convert", "OUTPUT_TYPES")


@click.group(
    "slimrt", cls=GuardedGroup, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100}
)
@click.version_option(__version__, "--version", "-V", prog_name="slimrt")
def cli() -> None:
    """Run LLaMA-family GGUF models, without a deep-learning framework.

    With no --model, a small default model is used, and fetched the first time.
    """


def print_json(data: Any) -> None:
    """``data`` as one line on stdout."""
    click.echo(json.dumps(data, ensure_ascii=False))


# -- asking a model ----------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("prompt", required=False)
@file_option("A document; PROMPT follows it as the question.")
@click.option("--chat", is_flag=True, help="Put the text through the chat template, as a message.")
@click.option("--system", metavar="TEXT", help="System prompt; implies --chat.")
@answer_options(max_tokens=GENERATE_MAX_TOKENS)
@load_options
@cache_option
@json_option
def generate(
    prompt: str | None, file: Path | None, chat: bool, system: str | None, answer: AnswerSettings, load: LoadSettings,
    as_json: bool,
) -> None:  # fmt: skip
    """Continue PROMPT, or answer it (--chat).

    A text piped into standard input is the document, as --file is, and PROMPT the question after it; without PROMPT
    (or with -) it is the prompt. The answer goes to stdout as it comes, what it cost to stderr.

    \b
    slimrt generate "Three uses of a brick:" --max-tokens 60
    slimrt generate --chat --file report.txt "What does the report recommend?"
    git diff | slimrt generate --chat "What does this change do?"
    """
    from slimrt.terminal.text_input import checked_argument, prompt_text, size_limit

    text = prompt_text(prompt, file, size_limit(load.ctx))
    if system is not None:
        checked_argument(system, "--system")
    from slimrt.terminal import generate as command

    command.generate(text, load, answer, chat=chat or system is not None, system=system, as_json=as_json)


@cli.command()
@file_option("A document to read first, as /load does.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@answer_options(max_tokens=CHAT_MAX_TOKENS, repeat_penalty=CHAT_REPEAT_PENALTY)
@load_options
@cache_option
@json_option
def chat(file: Path | None, system: str | None, answer: AnswerSettings, load: LoadSettings, as_json: bool) -> None:
    """Talk to a model.

    /help lists the commands: /load FILE reads a document. From a pipe each line is a message, and stdout gets the
    answers alone.
    """
    from slimrt.terminal.chat_start import start_chat

    start_chat(file, system, answer, load, as_json=as_json)


@cli.command()
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option("--template", metavar="TEXT", help="Lines are rows: the prompt, with {column} where a column goes.")
@click.option("--file-column", metavar="COLUMN", help="Lines are rows: the column that names each one's document.")
@click.option("--system", metavar="TEXT", help="System prompt of every row.")
@answer_options(max_tokens=GENERATE_MAX_TOKENS)
@force_option
@load_options
@json_option
def batch(load: LoadSettings, answer: AnswerSettings, as_json: bool, **settings: Any) -> None:
    """Answer every line of SOURCE into TARGET (JSON lines, as OpenAI's batches).

    Prompts that begin alike are answered one after the other, so that a document is read once. A run that was stopped,
    even killed, goes on when the same command is given again. With --template or --file-column lines are rows of any
    columns, and the answers' options hold for all.

    \b
    slimrt batch requests.jsonl answers.jsonl
    slimrt batch rows.jsonl answers.jsonl --file-column path --template "What does {author} recommend?"
    """
    from slimrt.terminal import batching

    batching.batch(batching.BatchSettings(**settings), load, answer, as_json=as_json)


@cli.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@file_option("Texts, one on each line; - is standard input.")
@click.option("--output", "-o", type=user_path, metavar="FILE", help="Where vectors go: JSON lines, or .npy.  [stdout]")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last", "cls"]),
    default="mean",
    show_default=True,
    help="The mean over a text's tokens, or its last or first one's.",
)
@click.option("--no-normalize", is_flag=True, help="Leave vectors at their own lengths.  [length 1]")
@force_option
@load_options
def embed(load: LoadSettings, no_normalize: bool, **settings: Any) -> None:
    """Write each TEXT as a vector of the model's last hidden states, as JSON lines or a NumPy file.

    \b
    slimrt embed "a text" "another"
    slimrt embed --file lines.txt -o vectors.npy
    """
    from slimrt.terminal import embedding

    embedding.embed(embedding.EmbedSettings(normalize=not no_normalize, **settings), load)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@click.option("--api-key", metavar="KEY", envvar="SLIMRT_API_KEY", help="What clients must send.  [nothing]")
@click.option("--sessions", type=click.IntRange(1), help="Requests answered at once.  [4, as memory allows]")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option("--max-body", type=Size(), default=32 << 20, show_default=True, help="Bytes of a request.")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="Let web pages of ORIGIN ask; repeatable.")
@load_options
@cache_option
def serve(load: LoadSettings, **settings: Any) -> None:
    """Answer over HTTP, as OpenAI's and Anthropic's servers do, and on a page to chat.

    \b
    slimrt serve --model model.gguf --ctx 32k
    then: base_url="http://127.0.0.1:8080/v1" in a client, or open http://127.0.0.1:8080
    """
    from slimrt.terminal import serving

    serving.serve(load, serving.ServeSettings(**settings))


@cli.command()
@click.argument("text", required=False)
@file_option("The text.")
@model_option
@click.option("--special", is_flag=True, help="Control tokens spelt in the text count as such.")
@click.option("--no-bos", is_flag=True, help="No begin token, whatever the model wants.")
@click.option("--pieces", is_flag=True, help="A table of ids and texts.")
@click.option("--count", is_flag=True, help="The number of tokens only.")
@click.option("--decode", is_flag=True, help="The other way round: TEXT is ids.")
@json_option
def tokenize(text: str | None, file: Path | None, model: str | None, as_json: bool, **how: bool) -> None:
    """Turn TEXT (- or nothing: standard input) into token ids."""
    from slimrt.terminal.text_input import prompt_text

    source = prompt_text(text, file)
    from slimrt.terminal import models

    models.tokenize(source, model, as_json=as_json, **how)


# -- model files -------------------------------------------------------------------------------------------------------


@cli.command()
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


@cli.command()
@click.argument("name", required=False, metavar="[MODEL]")
@click.option("--list", "listing", is_flag=True, help="Show what is there and its size; fetch nothing.")
@click.option("--force", is_flag=True, help="Fetch even what is there.")
@json_option
def pull(name: str | None, listing: bool, force: bool, as_json: bool) -> None:
    """Fetch MODEL (hf:owner/repo/file.gguf or a catalogue name), or check what is there; print its path."""
    from slimrt.terminal import models

    if listing:
        models.list_models(as_json=as_json)
    else:
        models.pull(name, force=force, as_json=as_json)


@cli.command()
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option("--type", "kind", type=output_type, default="f16", show_default=True, help="Type of the matrices.")
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


@cli.command()
@click.argument("source", type=user_path)
@click.argument("target", type=user_path)
@click.option("--type", "kind", type=output_type, required=True, help="Type of the matrices.")
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


@cli.group()
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


# -- measuring ---------------------------------------------------------------------------------------------------------


@cli.command("eval")
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
@click.option(
    "--length",
    "lengths",
    type=Size(),
    multiple=True,
    default=(2000,),
    show_default=True,
    help="Tokens of a prompt; repeatable.",
)
@click.option("--samples", type=click.IntRange(1), default=10, show_default=True, help="Prompts a task and length.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same prompts.")
@click.option(
    "--text",
    type=user_path,
    metavar="FILE",
    help="Running text, UTF-8, or pypi:networkx, pypi:sqlalchemy.  [Python's documentation]",
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
    slimrt eval --task text --length 4000 --prune fast --prune mine.json --png front.png
    """
    from slimrt.terminal import evaluation

    load = LoadSettings(model, ctx, device, "off", threads)
    evaluation.evaluate(evaluation.EvalSettings(**settings), load, as_json=as_json)


@cli.command()
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--max-kl", type=click.FloatRange(0), default=0.05, show_default=True, help="Mean KL to dense, nats.")
@click.option("--max-recall-drop", type=click.FloatRange(0), default=0.01, show_default=True, help="Of 1.")
@click.option("--max-nll-rise", type=click.FloatRange(0), default=0.02, show_default=True, help="Nats a token.")
@click.option("--max-answer-loss", type=click.FloatRange(0), default=0.3, show_default=True, help="Nats an answer.")
@click.option("--length", type=Size(), default=3000, show_default=True, help="Tokens of a prompt.")
@click.option("--samples", type=click.IntRange(8), default=48, show_default=True, help="Prompts in all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same prompts.")
@click.option(
    "--text",
    type=user_path,
    metavar="FILE",
    help="Running text, UTF-8, or pypi:networkx, pypi:sqlalchemy.  [Python's documentation]",
)
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

    load = LoadSettings(model, None, "auto", "off", threads)
    calibrating.calibrate_model(calibrating.CalibrateSettings(**settings), load, as_json=as_json)


@cli.command()
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
    slimrt explain --file report.txt --question "What does it recommend?" --prune fast
    """
    from slimrt.terminal import explaining

    explaining.explain_prompt(file, question, output, load, plain=plain, compare=compare, force=force, as_json=as_json)


@cli.group()
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
@load_options
@json_option
def serve_clients(load: LoadSettings, as_json: bool, **settings: Any) -> None:
    """What several clients of one server get.

    How long a stream stands still while another client's long prompt is read, and tokens a second of several clients.
    """
    from slimrt.terminal import benchmark

    benchmark.bench_serve(load, settings, as_json=as_json)


@bench.command()
@model_option
@click.option(
    "--length",
    "lengths",
    type=Size(),
    multiple=True,
    default=(512, 2048, 4096, 8000),
    show_default=True,
    help="Tokens of a prompt; repeatable.",
)
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
    metavar="llama_cpp|llama_cpp_best",
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
@kv_budget_option
@threads_option
@file_option("Text of the prompts.  [Python's documentation]")
@click.option("--png", type=user_path, metavar="FILE.png", help="Draw time to first token over prompt length.")
@force_option
@json_option
def ttft(model: str | None, file: Path | None, as_json: bool, **settings: Any) -> None:
    """Time to first token and decode speed.

    All programs read the same token ids, in processes of their own, taking turns.

    \b
    slimrt bench ttft --length 4k --prune off --prune auto --vs llama_cpp
    """
    from slimrt.terminal import benchmark

    benchmark.bench_ttft(model, benchmark.BenchSettings(text=file, **settings), as_json=as_json)


@bench.command()
@model_option
@click.option("--draft", default="auto", show_default=True, metavar="auto|lookup|MODEL", help="Who guesses.")
@click.option("--tokens", type=Size(), default=128, show_default=True, help="Tokens of each text.")
@repeats_option(5)
@threads_option
@json_option
def draft(model: str | None, draft: str, tokens: int, repeats: int, threads: int | None, as_json: bool) -> None:
    """What guesses at the next tokens bring, on text that repeats and text that does not."""
    from slimrt.terminal import benchmark

    load = LoadSettings(model, None, "auto", "off", threads, draft=draft)
    benchmark.bench_draft(load, tokens, repeats, as_json=as_json)


@bench.command()
@model_option
@click.option("--tokens", type=Size(), default=400, show_default=True, help="Tokens of each grammar.")
@threads_option
@json_option
def structured(model: str | None, tokens: int, threads: int | None, as_json: bool) -> None:
    """What a schema or a grammar costs a token, beside the model's own time for one."""
    from slimrt.terminal import benchmark

    benchmark.bench_structured(LoadSettings(model, None, "auto", "off", threads), tokens, as_json=as_json)


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
@click.option("--type", "kind", default="Q4_0", show_default=True, help="Type of the matrices: F16, Q4_0, Q8_0, ...")
@click.option(
    "--length",
    "lengths",
    type=Size(),
    multiple=True,
    default=(2048, 4096),
    show_default=True,
    help="Tokens of a prompt; repeatable.",
)
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
    slimrt bench shape --shape llama-3.1-8b --type Q4_0 --length 32k --prune off --prune 8k/4k/2k --device cuda
    """
    from slimrt.terminal import benchmark

    benchmark.bench_shape(benchmark.ShapeSettings(**settings), as_json=as_json)


def main() -> None:
    """The console script."""
    standard_streams()
    cli(prog_name="slimrt")


if __name__ == "__main__":
    main()
