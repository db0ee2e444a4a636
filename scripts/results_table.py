"""Tables of results, made of the newest files in ``docs/results``; never written by hand.

    python scripts/results_table.py [--readme README.md] [--results FILE] [--check]

GPU results are what ``make gpu`` leaves (``gpu-*.json``), CPU results what ``slimrt bench ttft --json`` prints
(``cpu-*.json``), quality is what ``slimrt eval --output`` writes (``quality-*.json``), of the library of documents and
of servers what ``slimrt bench ttft --library`` and ``slimrt bench serve --llama-server`` write with ``--output``
(``library-*.json``, ``serve-*.json``). Each table stands between two marker lines: the summary and the GPU's in the
README, the library's and the servers' in ``docs/library.md`` and ``docs/serve.md``, the others in
``docs/results/README.md``. A README without a place for the GPU's is refused, the other places may be missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.results_gpu import gpu_table
from slimrt.eval.report import RULER_MEAN

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
CPU_BEGIN, CPU_END = "<!-- cpu results: begin -->", "<!-- cpu results: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu details: begin -->", "<!-- gpu details: end -->"
DETAILS_BEGIN, DETAILS_END = "<!-- cpu details: begin -->", "<!-- cpu details: end -->"
LIBRARY_BEGIN, LIBRARY_END = "<!-- library results: begin -->", "<!-- library results: end -->"
SERVE_BEGIN, SERVE_END = "<!-- serve results: begin -->", "<!-- serve results: end -->"
QUALITY_BEGIN, QUALITY_END = "<!-- quality results: begin -->", "<!-- quality results: end -->"


_CONTENDERS = {
    "llama_cpp": "llama.cpp, the same file",
    "llama_cpp_best": "llama.cpp, its fastest format",
    "openvino": "OpenVINO GenAI, the same file",
    "slimrt off": "slimrt, dense",
    "slimrt auto": "slimrt `auto` (default)",
    "slimrt fast": "slimrt `fast`",
}


def summary_table(results: dict[str, Any], quality: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a contender at the longest prompt, with the recall that was measured nearest to that length."""
    longest = max(row["length"] for row in results["rows"])
    rows = {row["contender"]: row for row in results["rows"] if row["length"] == longest}
    recall: dict[str, str] = {}
    about = ""
    for report in quality:
        found = [row for row in report["summary"] if (row["task"], row["metric"]) == ("recall", "accuracy")]
        if not found:
            continue
        nearest = min((row["length"] for row in found), key=lambda length: abs(length - longest))
        for row in (row for row in found if row["length"] == nearest):
            recall["slimrt off"] = f"{row['dense']:.3f}"
            recall[f"slimrt {row['plan']}"] = f"{row['mean']:.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        count = _samples(report, [nearest])
        about = (
            f" Recall: share of a quoted passage's tokens predicted right, {count} prompts of {nearest:,} tokens, "
            "with the 95 % interval of the difference to dense."
        )
    environment, settings = results["environment"], results["settings"]
    more = settings.get("questions", 1)
    waiting = f" {1 + more} questions |" if more > 1 else ""
    lines = [
        f"| {longest:,}-token prompt | first token | follow-up |{waiting} tokens/s | recall |",
        f"|---|---:|---:|{'---:|' if waiting else ''}---:|---:|",
    ]
    for name in [name for name in _CONTENDERS if name in rows] + [name for name in rows if name not in _CONTENDERS]:
        row = rows[name]
        follow = f"{row['follow_up_s']:.2f} s" if row.get("follow_up_s") else "-"
        total = (f"{row['waiting_s']:.1f} s | " if row.get("follow_up_s") else "- | ") if waiting else ""
        lines.append(
            f"| {_CONTENDERS.get(name, name)} | {row['ttft_s']:.2f} s | {follow} | {total}{row['decode_tok_s']:.0f} "
            f"| {recall.get(name, '-')} |"
        )
    follow_up = f", follow-up of {settings['follow_up']} tokens" if settings["follow_up"] else ""
    if waiting:
        follow_up += f", {1 + more} questions: the waiting for the first tokens of all of them"
    return "\n".join(
        [
            *lines,
            "",
            f"{Path(settings['model']).name}, {settings['threads']} threads of {environment['cpu']} "
            f"({environment.get('backend', {}).get('why', 'unknown backend')}), {environment['date'][:10]}; medians of "
            f"{settings['repeats']} runs{follow_up}.{about}",
        ]
    )


def cpu_table(results: dict[str, Any]) -> str:
    """Markdown: a line a prompt length, a pair of columns a contender; medians, the range of all runs in brackets."""
    rows, environment, settings = results["rows"], results["environment"], results["settings"]
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [
        f"| prompt tokens | {' | '.join(f'{name}: first token, s | tokens/s' for name in contenders)} |",
        f"|---:|{'---:|---:|' * len(contenders)}",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        cells = []
        for row in (row for row in rows if row["length"] == length):
            low, high = row["ttft_range_s"]
            slow, quick = row["decode_range_tok_s"]
            cells.append(
                f"{row['ttft_s']:.2f} ({low:.2f}..{high:.2f}) | {row['decode_tok_s']:.0f} ({slow:.0f}..{quick:.0f})"
            )
        lines.append(f"| {length} | {' | '.join(cells)} |")
    options = [f"--length {length}" for length in settings["lengths"]]
    options += [f"--prune {plan}" for plan in settings["plans"]] + [f"--vs {name}" for name in settings["vs"]]
    options += [f"--follow-up {settings['follow_up']}"] if settings["follow_up"] else []
    options += [f"--questions {settings['questions']}"] if settings.get("questions", 1) > 1 else []
    why = environment.get("backend", {}).get("why", "unknown backend")
    return "\n".join(
        [
            *lines,
            "",
            f"{Path(settings['model']).name}, {settings['threads']} threads of {environment['cpu']}; {why}; medians of "
            f"{settings['repeats']} runs in turns (range), load average before {environment['load']}; "
            f"{environment['date'][:10]}, `slimrt bench ttft {' '.join(options)} --repeats {settings['repeats']}`.",
        ]
    )


def quality_table(report: dict[str, Any]) -> str:
    """Markdown: a line a plan and prompt length; means of the dense run and the plan, 95 % intervals of differences."""
    found = {(row["plan"], row["length"], row["task"], row["metric"]): row for row in report["summary"]}

    def change(*key: Any) -> str:
        row = found[key]
        return f"{row['dense']:.3f} -> {row['mean']:.3f} ({row['low']:+.3f} to {row['high']:+.3f})"

    tasks = list(dict.fromkeys(row["task"] for row in report["summary"]))
    measures = {"recall": ("recall, top-1", "accuracy"), "continuation": ("log-likelihood, nats", "nll")}
    columns = [(heading, task, metric) for task, (heading, metric) in measures.items() if task in tasks]
    columns += [("RULER, mean score", RULER_MEAN, "score")] * (RULER_MEAN in tasks)
    quoted = [task for task in measures if task in tasks]
    heads = ["plan", "prompt", *(heading for heading, _, _ in columns)]
    faster = {(one["plan"], one["length"]): f"{one['speedup']:.2f}x faster" for one in report["ttft"]}
    heads += [f"KL, nats ({' / '.join(quoted)})"] * bool(quoted) + ["first token"] * bool(faster)
    lines = [
        "| " + " | ".join(heads) + " |",
        "|---|---:|" + "---|" * (len(heads) - 2 - bool(faster)) + "---:|" * bool(faster),
    ]
    for key in sorted({row[:2] for row in found}, key=lambda key: (list(report["plans"]).index(key[0]), key[1])):
        cells = [f"`{Path(key[0]).stem}`", f"{key[1]:,}"]
        cells += [change(*key, task, metric) for _, task, metric in columns]
        if quoted:
            cells.append(" / ".join(f"{found[*key, task, 'kl']['mean']:.3f}" for task in quoted))
        cells += [faster[key]] if faster else []
        lines.append("| " + " | ".join(cells) + " |")
    text = f", text `{report['text']['name']}`" if quoted else ""
    about = (
        f"Dense -> pruned, with the 95 % interval of the difference; {_samples(report)} samples a task, "
        f"seed {report['seed']}{text}; `slimrt eval`."
    )
    return "\n".join([*lines, "", about])


_IDLE = 1.0  # load average under which a machine did little else


def library_table(report: dict[str, Any]) -> str:
    """Markdown: a line a plan; medians in seconds, and their shares of the cold one."""
    lines = [
        "| plan | cold | the same question | another one at once | soon | later | on disk |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    after = []
    for plan, runs in report["runs"].items():
        cold = statistics.median(run["cold_s"] for run in runs)
        cells = [f"{cold:.1f} s"]
        for name in ("same_s", "at_once_s", "soon_s", "later_s"):
            values = [run[name] for run in runs if run.get(name) is not None]
            middle = statistics.median(values) if values else None
            cells.append("-" if middle is None else f"{middle:.2f} s ({middle / cold:.1%})".replace("%", " %"))
        size = statistics.median(run["nbytes"] for run in runs) / 2**20
        lines.append(f"| `{plan}` | {' | '.join(cells)} | {size:.0f} MiB |")
        if whole := statistics.median(run["whole_s"] for run in runs):
            soon = statistics.median(run.get("soon_after_s", 0.0) for run in runs)
            after.append(f"{soon:.0f} and {whole:.0f} s (`{plan}`)" if soon else f"- and {whole:.0f} s (`{plan}`)")
    where, repeats = report["environment"], max(len(runs) for runs in report["runs"].values())
    counted = "one run" if repeats == 1 else f"medians of {repeats} runs"
    options = (
        f"--length {report['length']} {' '.join(f'--prune {plan}' for plan in report['runs'])} --repeats {repeats}"
    )
    busy = "" if where["load"] < _IDLE else " (other programs kept it busy: the shares say more than the seconds)"
    lines += [
        "",
        f"First token of {report['length']:,} tokens, {report['model']}, {report['threads']} threads of "
        f"{where['cpu']}, {where['date'][:10]}, {counted}, load average before {where['load']}{busy}; in brackets: of "
        f"the cold one; `slimrt bench ttft --library {options}`."
        + (f' "Soon" and "later" began {", ".join(after)} after the end of the first process.' if after else ""),
    ]
    return "\n".join(lines)


def serve_table(report: dict[str, Any]) -> str:
    """Markdown: a line a figure, a column a server; medians, the range of all runs in brackets."""
    setting, where = report["setting"], report["environment"]
    names = list(report["crowds"])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]

    def row(what: str, values: Callable[[str], list[float]], form: str) -> None:
        cells = [f"{statistics.median(v):{form}} ({min(v):{form}}..{max(v):{form}})" for v in map(values, names)]
        lines.append(f"| {what} | {' | '.join(cells)} |")

    if setting["length"]:
        beside = report["standstills"]
        long = f"{setting['length']:,} tokens"
        row(f"a stream while {long} of another client are read: a token, median, s",
            lambda name: [run["median_s"] for run in beside[name]], ".3f")  # fmt: skip
        row("the longest, s", lambda name: [run["longest_s"] for run in beside[name]], ".2f")
        row(f"first token of those {long}, s", lambda name: [run["ttft_s"] for run in beside[name]], ".1f")
    for clients in setting["clients"]:
        many = "1 client" if clients == 1 else f"{clients} clients together"
        row(f"tokens/s of {many}",
            lambda name, n=clients: [run["tokens_per_s"] for run in report["crowds"][name][str(n)]], ".0f")  # fmt: skip
    last = setting["clients"][-1]
    row(
        f"first token, {last} clients, s",
        lambda name: [run["ttft_s"] for run in report["crowds"][name][str(last)]],
        ".1f",
    )
    clients = " ".join(f"--clients {n}" for n in setting["clients"])
    lines += [
        "",
        f"{setting['model']}, prompts of {setting['prompt']} tokens and answers of {setting['tokens']}, slimrt with "
        f"`--prune {setting['prune']}`; medians of {setting['repeats']} runs in turns (range), {setting['threads']} "
        f"threads of {where['cpu']}, load average before {where['load']}, {where['date'][:10]}: `slimrt bench serve "
        f"--length {setting['length']} {clients} --prompt {setting['prompt']} --decode-tokens {setting['tokens']} "
        f"--repeats {setting['repeats']} --llama-server llama-server`.",
    ]
    return "\n".join(lines)


def _samples(report: dict[str, Any], lengths: Sequence[int] = ()) -> str:
    """How many prompts of a task there are at each length."""
    counts = {row["length"]: row["n"] for row in report["summary"] if row["task"] != RULER_MEAN}
    each = [str(counts[length]) for length in lengths or sorted(counts)]
    return each[0] if len(set(each)) == 1 else " and ".join(each)


def placed(readme: str, begin: str, end: str, text: str) -> str | None:
    """``readme`` with ``text`` between its two marker lines, or None if it has none."""
    before, found, rest = readme.partition(begin)
    _, ended, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}" if found and ended else None


def updated(
    readme: str,
    results: dict[str, Any] | None,
    cpu: dict[str, Any] | None = None,
    quality: Sequence[dict[str, Any]] = (),
) -> str | None:
    """``readme`` with the tables in their places, or None if it has no place for the GPU's."""
    after = placed(readme, BEGIN, END, gpu_table(results))
    if after is not None and cpu is not None:
        after = placed(after, CPU_BEGIN, CPU_END, summary_table(cpu, quality)) or after
    return after


def detailed(
    page: str, cpu: dict[str, Any] | None, quality: Sequence[dict[str, Any]], gpus: Sequence[dict[str, Any]] = ()
) -> str:
    """``page`` with every result in the places that it has for them."""
    if gpus:
        tables = "\n\n".join(gpu_table(results, details=True) for results in gpus)
        page = placed(page, GPU_BEGIN, GPU_END, tables) or page
    if cpu is not None:
        page = placed(page, DETAILS_BEGIN, DETAILS_END, cpu_table(cpu)) or page
    if quality:
        tables = "\n\n".join(quality_table(report) for report in quality)
        page = placed(page, QUALITY_BEGIN, QUALITY_END, tables) or page
    return page


def newest(folder: Path) -> dict[str, Any] | None:
    """The latest results of a GPU that are not a dry run's."""
    return max(gpu_reports(folder), key=lambda results: results["date"], default=None)


def gpu_reports(folder: Path) -> list[dict[str, Any]]:
    """All results of GPUs; dry runs' left out, and those of runs that found nothing, for want of a GPU that works."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    return [r for r in found if not r["dry"] and any(step["results"] for step in r["steps"].values())]


def newest_of(folder: Path, kind: str) -> dict[str, Any] | None:
    """The latest results of a ``kind`` that a command of slimrt wrote: cpu, library, serve."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{kind}-*.json")]
    return max(found, key=lambda results: results["environment"]["date"], default=None)


def quality_reports(folder: Path) -> list[dict[str, Any]]:
    """All reports of quality, by their files' names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("quality-*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, help="a results file, in place of the newest")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the table is not up to date")
    options = parser.parse_args()
    folder = ROOT / "docs" / "results"
    results = json.loads(options.results.read_text()) if options.results else newest(folder)
    before = options.readme.read_text()
    details = folder / "README.md"
    page = details.read_text()
    filled = detailed(page, newest_of(folder, "cpu"), quality_reports(folder), gpu_reports(folder))
    filled_pages = {details: filled}
    for name, begin, end, made in (
        ("library", LIBRARY_BEGIN, LIBRARY_END, library_table),
        ("serve", SERVE_BEGIN, SERVE_END, serve_table),
    ):
        path, found = folder.parent / f"{name}.md", newest_of(folder, name)
        if found is not None:
            text = path.read_text()
            filled_pages[path] = placed(text, begin, end, made(found)) or text
    changed = {path: text for path, text in filled_pages.items() if text != path.read_text()}
    after = updated(before, results, newest_of(folder, "cpu"), quality_reports(folder))
    if after is None:
        sys.exit(f"{options.readme}: has no lines {BEGIN!r} and {END!r}; add them where the table is to stand")
    if options.check:
        older = [str(path) for path in changed] + [str(options.readme)] * (after != before)
        sys.exit(f"{', '.join(older)}: older results; run this script" if older else 0)
    options.readme.write_text(after)
    for path, text in changed.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
