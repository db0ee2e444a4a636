"""Options that mean the same in every command, and the frozen settings they become."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slimrt import paths
from slimrt.config import SamplingConfig, parse_size
from slimrt.errors import SettingError
from slimrt.load_options import LoadOptions

if TYPE_CHECKING:
    from slimrt.structured.grammar import Grammar

__all__ = [
    "AnswerSettings",
    "LazyChoice",
    "LoadSettings",
    "ManyChoices",
    "answer_options",
    "cache_option",
    "ctx_option",
    "device_option",
    "file_option",
    "force_option",
    "json_option",
    "kv_budget_option",
    "lengths_option",
    "load_options",
    "model_option",
    "repeats_option",
    "seed_option",
    "shape_option",
    "text_option",
    "threads_option",
    "user_path",
]

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


@dataclass(frozen=True)
class LoadSettings(LoadOptions):
    """Which model, and how it is loaded."""

    model: str | None = None


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is drawn and when it ends. ``max_tokens`` None: until the model stops or the context is full."""

    sampling: SamplingConfig
    max_tokens: int | None
    stop: tuple[str, ...]
    grammar: Grammar | None = None

    def keywords(self) -> dict[str, Any]:
        """As ``LLM.stream`` takes them."""
        sampling = {name: getattr(self.sampling, name) for name in SamplingConfig.__dataclass_fields__}
        return {"max_tokens": self.max_tokens, "stop": self.stop, "grammar": self.grammar, **sampling}


class Size(click.ParamType):
    """A count with an optional k (1024) or m (1024**2)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


def _seed(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    return None if value == -1 else value  # as llama.cpp's programs write a fresh one


class UserPath(click.ParamType):
    """A path, with ~ for the user's folder where the shell left it (as in --file=~/x)."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return paths.user_path(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)


class LazyChoice(click.ParamType):
    """One of the names in ``attribute`` of ``module``, which is imported only when the option is used or explained."""

    name = "type"

    def __init__(self, module: str, attribute: str) -> None:
        self._module, self._attribute = module, attribute

    def _choices(self) -> tuple[str, ...]:
        return tuple(getattr(import_module(self._module), self._attribute))

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._choices())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.lower() not in self._choices():
            self.fail(f"{value!r} is not one of {', '.join(self._choices())}", param, ctx)
        return str(value.lower())


class ManyChoices(click.Option):
    """An option of a ``LazyChoice`` with more names than stand beside it: its help lists them."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None:
            return None
        choices = self.type.get_metavar(self, ctx) or ""
        told = f"{record[1]}  {choices.strip('[]').replace('|', ', ')}"
        return record[0].replace(choices, self.type.name.upper()), told


class LogitBias(click.ParamType):
    """``TOKEN=BIAS``: a token id and what is added to its logit; ``-inf`` forbids it."""

    name = "token=bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} must read TOKEN=BIAS, a token id and a number, such as 42=-inf", param, ctx)


class Lora(click.ParamType):
    """``FILE`` or ``FILE:SCALE``; a file that has such a name as a whole is meant as a whole."""

    name = "file[:scale]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        if isinstance(value, tuple):
            return value
        file, _, scale = value.rpartition(":")
        try:
            if file and not paths.user_path(value).exists():
                with contextlib.suppress(ValueError):
                    return paths.user_path(file), float(scale)
            return paths.user_path(value), 1.0
        except SettingError as error:
            self.fail(str(error), param, ctx)


model_option = click.option(
    "--model", "-m", metavar="MODEL", help="A .gguf file, hf:owner/repo/file.gguf or a catalogue name.  [smollm2-135m]"
)
ctx_option = click.option("--ctx", "-c", type=Size(), help="Most tokens of a conversation, such as 8192 or 64k.")
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "numpy", "auto"]),
    default="auto",
    show_default=True,
    help="What computes; auto: a GPU where one works; numpy: the slower reference.",
)
threads_option = click.option(
    "--threads", "-t", type=click.IntRange(1), help="CPU threads.  [all that the process may use]"
)
kv_budget_option = click.option(
    "--kv-budget", type=Size(), metavar="ROWS", help="Rows of keys and values a layer that decode reads.  [all]"
)
shape_option = click.option(
    "--shape",
    type=LazyChoice("slimrt.bench.synthetic", "SHAPES"),
    default="smollm2-135m",
    show_default=True,
    help="Whose sizes.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout and nothing else there.")
force_option = click.option("--force", is_flag=True, help="Replace files that are there already.")
user_path = UserPath()
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same prompts."
)
text_option = click.option(
    "--text",
    type=user_path,
    metavar="FILE",
    help="Running text, UTF-8, or pypi:networkx, pypi:sqlalchemy.  [Python's documentation]",
)


def lengths_option(*default: int) -> Decorator[Any]:
    """``--length`` of prompts that are measured, as often as one likes."""
    return click.option(
        "--length",
        "lengths",
        type=Size(),
        multiple=True,
        default=default,
        show_default=True,
        help="Tokens of a prompt; repeatable.",
    )


def repeats_option(default: int) -> Decorator[Any]:
    """``--repeats`` of a benchmark."""
    return click.option(
        "--repeats", type=click.IntRange(1), default=default, show_default=True, help="Runs of each; medians are shown."
    )


def file_option(text: str) -> Decorator[Any]:
    """``--file/-f``; its content is UTF-8 text."""
    return click.option("--file", "-f", "file", type=user_path, metavar="FILE", help=text)


def cache_option(command: Command) -> Command:
    """``--no-cache``; applied below ``load_options``, it settles whether ``load`` uses the library of documents."""

    @functools.wraps(command)
    def wrapped(*, load: LoadSettings, no_cache: bool, **options: Any) -> Any:
        return command(load=replace(load, cache=not no_cache), **options)

    text = "Do not keep what is read of long documents on disk, nor use what is kept."
    return _decorated(wrapped, click.option("--no-cache", is_flag=True, help=text))


def load_options(command: Command) -> Command:
    """The options of LoadSettings; the command receives ``load: LoadSettings``."""

    @functools.wraps(command)
    def wrapped(**options: Any) -> Any:
        names = LoadSettings.__dataclass_fields__
        load = LoadSettings(**{name: options.pop(name) for name in names if name in options})
        return command(load=load, **options)

    return _decorated(
        wrapped,
        model_option,
        ctx_option,
        click.option("--prune", default="auto", show_default=True, metavar="auto|fast|off|PLAN.json",
                     help="Which prompt tokens leave the forward pass early."),
        device_option,
        threads_option,
        kv_budget_option,
        click.option("--rope-scaling", type=click.Choice(["none", "linear", "yarn"]),
                     help="How RoPE is stretched.  [yarn past the trained context]"),
        click.option("--rope-base", type=float, metavar="BASE", help="RoPE's base frequency.  [the model's]"),
        click.option("--rope-factor", type=float, metavar="X", help="How far RoPE is stretched.  [as --ctx needs]"),
        click.option("--overflow", type=click.Choice(["error", "shift"]), default="error", show_default=True,
                     help="When the context is full: stop, or drop the oldest text."),
        click.option("--draft", default="auto", show_default=True, metavar="auto|lookup|off|MODEL",
                     help="How next tokens are guessed, to read several at once; the text is the same."),
        click.option("--lora", type=Lora(), multiple=True, metavar="FILE[:SCALE]",
                     help="A LoRA adapter (GGUF) to apply; repeatable."),
        click.option("--stream-weights", is_flag=True,
                     help="Keep weights in host memory, for models larger than the GPU."),
        click.option("--chat-template", metavar="NAME|JINJA", help="In place of the model's own chat template."),
    )  # fmt: skip


def answer_options(max_tokens: int, repeat_penalty: float = 1.0) -> Decorator[Any]:
    """Length, stop strings and sampling, with these defaults; the command receives ``answer: AnswerSettings``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(**options: Any) -> Any:
            sampling = {name: options.pop(name) for name in SamplingConfig.__dataclass_fields__ if name in options}
            sampling["logit_bias"] = dict(sampling["logit_bias"])
            limit = options.pop("max_tokens")
            grammar = _grammar_in(options.pop("schema"), options.pop("grammar"))
            answer = AnswerSettings(
                SamplingConfig(**sampling), None if limit == -1 else limit, options.pop("stop"), grammar
            )
            return command(answer=answer, **options)

        return _decorated(
            wrapped,
            click.option("--max-tokens", "-n", type=click.IntRange(-1), default=max_tokens, show_default=True,
                         help="Most tokens of an answer; -1: until the model stops or the context is full."),
            click.option("--schema", type=user_path, metavar="FILE", help="A JSON schema that the answer is valid by."),
            click.option("--grammar", type=user_path, metavar="FILE",
                         help="A grammar that the answer matches: GBNF or Lark."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable."),
            click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token."),
            click.option("--seed", type=click.IntRange(-1), callback=_seed,
                         help="Same seed, same text; -1: a fresh one.  [-1]"),
            click.option("--top-k", type=int, default=0, help="Draw from the K likeliest tokens.  [0: off]"),
            click.option("--top-p", type=float, default=1.0, help="Draw from the likeliest mass P.  [1: off]"),
            click.option("--min-p", type=float, default=0.0, help="Least share of the top probability.  [0: off]"),
            click.option("--typical-p", type=float, default=1.0, help="Locally typical sampling.  [1: off]"),
            click.option("--top-n-sigma", type=float, default=0.0,
                         help="Logits within N standard deviations of the largest.  [0: off]"),
            click.option("--xtc-probability", type=float, default=0.0,
                         help="How often the likeliest tokens are left out.  [0: off]"),
            click.option("--xtc-threshold", type=float, default=0.1, show_default=True,
                         help="Which these are: all but the last of at least this probability."),
            click.option("--dynatemp-range", type=float, default=0.0,
                         help="Move the temperature by up to so much with the entropy.  [0: off]"),
            click.option("--dynatemp-exponent", type=float, default=1.0, show_default=True,
                         help="Power of the entropy's share."),
            click.option("--mirostat", type=click.IntRange(0, 2), default=0,
                         help="Hold the text's surprise at a target: version 1 or 2, in place of filters.  [0: off]"),
            click.option("--mirostat-tau", type=float, default=5.0, show_default=True, help="The target, in bits."),
            click.option("--mirostat-eta", type=float, default=0.1, show_default=True, help="The rate of correction."),
            click.option("--dry-multiplier", type=float, default=0.0,
                         help="Weaken what makes a repetition longer.  [0: off]"),
            click.option("--dry-base", type=float, default=1.75, show_default=True,
                         help="How the penalty grows with each token repeated."),
            click.option("--dry-allowed-length", type=click.IntRange(0), default=2, show_default=True,
                         help="Tokens that may repeat."),
            click.option("--dry-penalty-last-n", type=click.IntRange(-1), default=64, show_default=True,
                         help="Tokens that are looked at; -1: all."),
            click.option("--dry-sequence-breaker", "dry_sequence_breakers", multiple=True, metavar="TEXT",
                         default=SamplingConfig.dry_sequence_breakers, show_default=False,
                         help="No repetition goes across TEXT; repeatable.  [line end, :, \", *]"),
            click.option("--repeat-penalty", type=float, default=repeat_penalty, show_default=True,
                         help="Weakens recent tokens; 1: off."),
            click.option("--presence-penalty", type=float, default=0.0, help="Subtracted once per token.  [0: off]"),
            click.option("--frequency-penalty", type=float, default=0.0, help="Subtracted per occurrence.  [0: off]"),
            click.option("--logit-bias", type=LogitBias(), multiple=True, metavar="TOKEN=BIAS",
                         help="Added to a token's logit; -inf forbids it; repeatable."),
        )  # fmt: skip

    return decorate


def _grammar_in(schema: Path | None, grammar: Path | None) -> Grammar | None:
    """What is in the files of --schema and --grammar. Raises SettingError."""
    if schema is None and grammar is None:
        return None
    from slimrt.structured.grammar import MAX_BYTES, grammar_of
    from slimrt.terminal.text_input import read_document

    texts = [None if path is None else read_document(path, MAX_BYTES) for path in (schema, grammar)]
    try:
        return grammar_of(*texts)
    except SettingError as error:
        if schema is not None and grammar is not None:
            raise
        raise SettingError(f"{schema or grammar}: {error}") from None


def _decorated(command: Any, *decorators: Callable[[Any], Any]) -> Any:
    for decorator in reversed(decorators):
        command = decorator(command)
    return command
