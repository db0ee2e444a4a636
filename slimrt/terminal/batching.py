"""``slimrt batch``: a file of requests, or of rows and a template, answered into a file of answers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimrt.errors import SettingError
from slimrt.output import check_output
from slimrt.terminal.guard import note
from slimrt.terminal.loading import load_model
from slimrt.terminal.options import AnswerSettings, LoadSettings
from slimrt.terminal.progress import progress_bar

if TYPE_CHECKING:
    from slimrt.batch.cluster import RayCluster

__all__ = ["BatchSettings", "batch"]


@dataclass(frozen=True)
class BatchSettings:
    """The files, how rows become prompts, and the cluster that answers, if one does; as the command's options."""

    source: Path
    target: Path
    template: str | None
    file_column: str | None
    system: str | None
    force: bool
    ray: str | None = None
    workers: int | None = None


def batch(settings: BatchSettings, load: LoadSettings, answer: AnswerSettings, *, as_json: bool) -> None:
    """Answer every line; a line on stderr, or with ``as_json`` the report on stdout."""
    from slimrt.batch.answering import model_mark
    from slimrt.batch.lines import Rows
    from slimrt.batch.run import answer_batch

    if not settings.source.is_file():
        raise SettingError(f"{settings.source}: no such file; name a file of JSON lines")
    goes_on = settings.target.is_file() and not settings.force
    check_output(settings.target, sources=[settings.source], force=settings.force or goes_on)
    if settings.force:
        settings.target.unlink(missing_ok=True)
    rows = None
    if settings.template is not None or settings.file_column is not None:
        rows = Rows(
            settings.template or "", settings.source.parent, settings.file_column, settings.system, _body(answer)
        )
    elif settings.system is not None:
        raise SettingError("--system: requests have their own messages; it needs --template or --file-column")
    elif answer.grammar is not None:
        raise SettingError("--schema: requests have their own response_format; it needs --template or --file-column")
    if settings.workers is not None and settings.ray is None:
        raise SettingError("--workers: are those of a cluster; it needs --ray")
    llm = load_model(load)
    cluster = None if settings.ray is None else _cluster(settings.ray, settings.workers, load, model_mark(llm))
    try:
        with progress_bar("answering") as progress:
            report = answer_batch(llm, settings.source, settings.target, rows, progress, cluster)
    except KeyboardInterrupt:
        note(f"the answers so far are in {settings.target}; the same command goes on with the rest")
        raise
    finally:
        if cluster is not None:
            cluster.close()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    share = 100 * report.reused / report.prompt_tokens if report.prompt_tokens else 0
    before = f" ({report.before:,} of them before)" if report.before else ""
    note(
        f"{report.lines:,} lines answered{before}, {report.failed:,} with an error; {report.prompt_tokens:,} prompt "
        f"tokens, {share:.0f} % of them read once for several; {report.written:,} written; the answers are in "
        f"{settings.target}"
    )


def _cluster(address: str, workers: int | None, load: LoadSettings, mark: int) -> RayCluster:
    """The cluster at ``address``, whose actors load what ``load`` says."""
    from slimrt.batch.cluster import RayCluster

    options = {field.name: getattr(load, field.name) for field in dataclasses.fields(load)}
    model = options.pop("model")

    def everywhere(name: str) -> str:
        """A file's name as it is called from other folders."""
        return str(Path(name).absolute()) if Path(name).is_file() else name

    options["prune"] = everywhere(options["prune"])
    options["draft"] = everywhere(options["draft"])
    options["lora"] = [(str(path.absolute()), scale) for path, scale in options["lora"]]
    return RayCluster(address, None if model is None else everywhere(model), options, mark, workers)


def _body(answer: AnswerSettings) -> dict[str, Any]:
    """The options of the command as fields of a request."""
    s = answer.sampling
    body: dict[str, Any] = {
        "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p, "typical_p": s.typical_p,
        "repeat_penalty": s.repeat_penalty, "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty, "seed": s.seed, "stop": list(answer.stop) or None,
        "max_tokens": answer.max_tokens,
        "top_n_sigma": s.top_n_sigma, "xtc_probability": s.xtc_probability, "xtc_threshold": s.xtc_threshold,
        "dynatemp_range": s.dynatemp_range, "dynatemp_exponent": s.dynatemp_exponent, "mirostat": s.mirostat,
        "mirostat_tau": s.mirostat_tau, "mirostat_eta": s.mirostat_eta, "dry_multiplier": s.dry_multiplier,
        "dry_base": s.dry_base, "dry_allowed_length": s.dry_allowed_length,
        "dry_penalty_last_n": s.dry_penalty_last_n, "dry_sequence_breakers": list(s.dry_sequence_breakers),
        "logit_bias": {str(token): bias for token, bias in s.logit_bias.items()},
    }  # fmt: skip
    if answer.grammar is not None:
        if answer.grammar.kind != "JSON schema":
            raise SettingError(
                f"--grammar with a {answer.grammar.kind}: a batch takes JSON schemas only; give --schema"
            )
        schema = {"name": "row", "schema": json.loads(answer.grammar.text)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {name: value for name, value in body.items() if value is not None}
