"""``slimrt explain``: what it says was kept is what the caches hold, and the page is safe, whole and self-contained."""

from __future__ import annotations

import io
import json
import os
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import slimrt
from click_cli import cli
from slimrt.errors import ContextError
from slimrt.explain.blocks import block_texts
from slimrt.explain.page import html_page, readable_score, readable_seconds
from slimrt.explain.report import Explanation, explain
from slimrt.explain.text import signs, summary
from slimrt.prune.plan import PrunePlan, Stage, Window
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama
from tests.tolerance import doubles

PLAN = PrunePlan((Stage(1, 0.5), Stage(3, 0.25)), block=16, min_tokens=50, query_window=8)
DOCUMENT = "the <b>world</b> & hello worlds; \x07 ünï © 😀 in a row. " * 8
HOSTILE = "<script>alert('x')</script> \"quoted\" & why?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=6, ctx=2048)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, prune=PLAN, threads=1)


@pytest.fixture(scope="module")
def seen(llm: slimrt.LLM) -> Explanation:
    return explain(llm, llm.tokenize(DOCUMENT + HOSTILE), question=HOSTILE)


class Page(HTMLParser):
    """The text of a page, its tags, and whether all that was opened was closed."""

    VOID = ("meta", "rect", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(dict(attrs).get("class") or tag)
        if (dict(attrs).get("class") or "").startswith("block "):
            self.blocks.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1].startswith("block "):
            self.blocks[-1] += data


# -- what is reported --------------------------------------------------------------------------------------------------


def test_blocks_survive_as_the_caches_say(llm: slimrt.LLM, seen: Explanation) -> None:
    """The rows that a layer holds, by position, are the blocks said to have passed the cuts before it."""
    session = llm.session()
    session.prefill(llm.tokenize(DOCUMENT + HOSTILE), PLAN)
    for number in range(6):
        held = session.context.cache.rows(number)[2]
        cuts_before = sum(cut.layer < number for cut in seen.cuts)
        expected = [b for b in seen.blocks if b.survived >= cuts_before]
        assert np.unique(held // PLAN.block).tolist() == [b.number for b in expected]
        assert len(held) == sum(b.tokens for b in expected) == seen.layers[number].tokens == seen.layers[number].kv_rows
    assert {b.survived for b in seen.blocks} == {0, 1, 2}


def test_numbers_agree_with_one_another(llm: slimrt.LLM, seen: Explanation) -> None:
    assert [cut.layer for cut in seen.cuts] == [1, 3]
    for place, cut in enumerate(seen.cuts):
        assert cut.blocks_before == sum(b.survived >= place for b in seen.blocks)
        assert cut.blocks_after == sum(b.survived > place for b in seen.blocks)
        assert cut.tokens_after == sum(b.tokens for b in seen.blocks if b.survived > place)
    assert [span.tokens for span in seen.spans()] == [seen.tokens, *(cut.tokens_after for cut in seen.cuts)]
    assert [(span.first, span.last) for span in seen.spans()] == [(0, 1), (2, 3), (4, 5)]
    assert sum(layer.seconds for layer in seen.layers) + seen.outside_s == doubles(seen.ttft_s, 64)
    assert all(layer.seconds > 0 for layer in seen.layers) and seen.outside_s > 0
    assert seen.kv_dense == seen.tokens * llm.engine.kv_bytes_per_token
    assert seen.kv_host == 0 and seen.kv_resident == seen.kv_kept < seen.kv_dense


def test_what_a_block_was_wanted_for_and_what_was_in_doubt(model: Path) -> None:
    plan = PrunePlan((Stage(1, 0.8), Stage(3, 0.65)), block=16, score="asked", sure=1.0, most=0.9)
    llm = slimrt.load(model, prune=plan, threads=1)
    seen = explain(llm, llm.tokenize("Which world is it?\n\n" + DOCUMENT * 3 + "\n\nIs it hello?"))
    told = [why for block in seen.blocks for why in block.wanted if why]
    assert told and all(re.match(r"by token \d+, the end of |as the successor of block \d+$", why) for why in told)
    assert any("successor" in why for why in told) and any("by token" in why for why in told)
    assert all(len(block.wanted) == len(block.scores) for block in seen.blocks)
    # No block reaches a score of 1: that is a doubt, at each cut.
    assert len(seen.doubts) == 2 and all("no block is wanted for sure" in doubt for doubt in seen.doubts)
    page = html_page(seen)
    assert "no block is wanted for sure" in page and "wanted by token" in page
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*summary(seen), sep="\n")
    assert "In doubt: layer 1" in console.export_text()


def test_a_dense_run_beside_it_shows_what_is_missed(llm: slimrt.LLM, model: Path) -> None:
    ids = llm.tokenize(DOCUMENT + HOSTILE)
    seen = explain(llm, ids, against_dense=True)
    found = seen.compared
    assert found is not None and len(found.attended) == len(found.missed) == len(seen.blocks)
    # What was never dropped is not missed, and what left at the first cut is missed in all layers behind it.
    for block in seen.blocks:
        if block.survived == len(seen.cuts):
            assert found.missed[block.number] == 0
        elif block.survived == 0:
            assert found.missed[block.number] == found.attended[block.number] > 0
        else:
            assert 0 < found.missed[block.number] < found.attended[block.number]
    assert 0.5 < sum(found.attended) < 1  # the rest falls to the answer itself
    # The answer is the dense run's own, and its likelihood that of other calls.
    dense = slimrt.load(model, prune="off", threads=1)
    answer = dense.generate(ids, max_tokens=found.tokens, logprobs=0)
    assert answer.logprobs is not None and llm.detokenize(answer.tokens, special=True) == found.answer
    # Logits are the same bits; log-softmax runs in float32 there, in float64 here.
    rows = llm.continuation_logits([*ids, *answer.tokens], len(ids), decode=True)
    shifted = rows - rows.max(axis=1, keepdims=True)
    naive = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    exact = shifted.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    rounding = 4 * found.tokens * float(np.abs(naive - exact).max())
    assert -sum(one.logprob for one in answer.logprobs) == pytest.approx(found.nats_dense, abs=rounding)
    after = llm.logprobs([*ids, *answer.tokens], len(ids), decode=True)
    assert -float(after.sum()) == pytest.approx(found.nats_plan, abs=rounding)
    page = Page(html_page(seen))
    assert not page.open
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(*summary(seen), sep="\n")
    assert "Beside a dense run" in console.export_text()
    with pytest.raises(ContextError, match="context"):
        explain(slimrt.load(model, ctx=len(ids) + 3), ids, against_dense=True)


def test_the_best_scored_go_on(seen: Explanation) -> None:
    for place in range(len(seen.cuts)):
        there = [b for b in seen.blocks if b.survived >= place]
        assert all(len(b.scores) == min(b.survived + 1, len(seen.cuts)) for b in seen.blocks)
        scores = [b.scores[place] for b in there]
        wanted = zip(there, map(max, scores, [0.0, *scores]), strict=True)  # for its own sake, or to go on
        free = [(b, most) for b, most in wanted if not b.always]
        passed = [most for b, most in free if b.survived > place]
        failed = [most for b, most in free if b.survived == place]
        assert not passed or not failed or min(passed) >= max(failed)
    assert all(b.survived == len(seen.cuts) for b in seen.blocks if b.always)
    assert seen.blocks[0].always == "start" and seen.blocks[-1].always == "end"


def test_a_trace_changes_nothing(llm: slimrt.LLM, seen: Explanation) -> None:
    ids = llm.tokenize(DOCUMENT + HOSTILE)
    before = llm.logits(ids)
    explain(llm, ids)
    np.testing.assert_array_equal(llm.logits(ids), before)


@pytest.mark.parametrize(
    ("prune", "tokens", "why"),
    [
        ("off", 200, "the prompt ran dense (plan off: dense)"),
        (PLAN, 40, "the prompt has 40 tokens, and this plan leaves prompts under 50 whole"),
        (PrunePlan((Stage(1, 0.9),), block=64), 100, "every stage of the plan would keep all of these 100 tokens"),
    ],
)
def test_dense_says_why(model: Path, prune: PrunePlan | str, tokens: int, why: str) -> None:
    llm = slimrt.load(model, prune=prune, threads=1)
    dense = explain(llm, llm.tokenize("a" * 2 * tokens)[:tokens])
    assert dense.why_dense == why and dense.cuts == () and dense.kv_resident == dense.kv_dense
    assert {dense.fate(b) for b in dense.blocks} == {"kept to the end"}
    assert f"Nothing was cut: {why}." in html_page(dense)
    assert len(dense.spans()) == 1


def test_rows_in_host_memory_are_shown(model: Path) -> None:
    llm = slimrt.load(model, prune=PLAN, threads=1, kv_budget=256)
    ids = llm.tokenize(DOCUMENT * 4)
    split = explain(llm, ids)
    whole = explain(slimrt.load(model, prune=PLAN, threads=1), ids)
    assert [b.survived for b in split.blocks] == [b.survived for b in whole.blocks]
    assert split.kv_kept == whole.kv_kept
    assert split.layers[0].kv_host > 0 and split.kv_resident < whole.kv_resident
    assert split.kv_resident + split.kv_host >= split.kv_kept  # no row is lost, some lie in both
    page = Page(html_page(split))
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    assert sum("0 B in host memory" not in label for label in labels if "host" in label) == sum(
        layer.kv_host > 0 for layer in split.layers
    )


def test_windows_are_shown_where_they_are(llm: slimrt.LLM) -> None:
    windowed = PrunePlan(
        PLAN.stages, block=16, query_window=8, windows=(Window(0, (64, 0)), Window(1, (64, 64))), full_rows=50
    )
    ids = llm.tokenize(DOCUMENT + HOSTILE)
    seen = explain(slimrt.load(llm.file.path, prune=windowed, threads=1), ids)
    assert seen.windowed_rows == (len(ids) - 50) // 128 * 128 > 0
    assert [layer.near_heads for layer in seen.layers] == [1, 2, 0, 0, 0, 0]
    page = html_page(seen)
    assert "Near heads" in page and "1 of 2" in page and "on 3 KV heads of 2 layers" in page
    shown = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for part in summary(seen):
        shown.print(part)
    assert re.search(r"near heads.*\n0-1 .* 3 of 4", shown.export_text())
    only = explain(slimrt.load(llm.file.path, prune=PrunePlan(windows=windowed.windows, full_rows=50), threads=1), ids)
    assert only.why_dense == "" and only.cuts == () and only.windowed_rows > 0


# -- text of blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_a_split_character_belongs_to_the_earlier_block(llm: slimrt.LLM, size: int) -> None:
    text = "aé😀日本 the world 😀😀ß"
    ids = llm.tokenize(text)  # no merges of these: a token for each byte, so borders fall into characters
    texts = block_texts(llm.tokenizer, ids, size)
    assert "".join(texts) == text and "\ufffd" not in "".join(texts)
    assert len(texts) == -(-len(ids) // size)
    if size == 2:
        assert texts[0] == "aé" and texts[1] == "😀"  # é begins in the first two bytes, 😀 right after it


def test_bytes_that_are_no_text_stay_in_their_blocks(llm: slimrt.LLM) -> None:
    ids = llm.tokenize("abécdef")
    broken = [*ids[:2], ids[3], *ids[4:]]  # a continuation byte without its beginning
    assert block_texts(llm.tokenizer, broken, 3) == ["ab\ufffd", "cde", "f"]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_shows_the_whole_prompt_and_is_well_formed(llm: slimrt.LLM, seen: Explanation) -> None:
    page = Page(html_page(seen))
    assert page.open == []
    assert "".join(page.blocks) == (DOCUMENT + HOSTILE).replace("\x07", "\u2407")
    labels = [attrs["aria-label"] for tag, attrs in page.tags if (attrs.get("class") or "").startswith("block ")]
    assert labels == [f"Block {b.number}, {seen.fate(b)}" for b in seen.blocks]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert targets <= {f"#{id}" for id in ids}


def test_page_is_self_contained_and_escaped(seen: Explanation) -> None:
    text = html_page(seen)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(name in attrs for tag, attrs in page.tags if tag != "a" for name in ("src", "href", "srcset"))
    assert "url(" not in text and "@import" not in text and "://" not in text
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script" not in text and "&lt;script&gt;" in text and "prefers-color-scheme: dark" in text


def test_page_of_the_same_run_is_the_same(seen: Explanation) -> None:
    assert html_page(seen) == html_page(seen)
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", html_page(seen))


def test_template_is_packaged() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "slimrt.explain" in settings["packages"]
    packaged = {
        f for pattern in settings["package-data"]["slimrt.explain"] for f in (root / "slimrt/explain").glob(pattern)
    }
    assert packaged == {f for f in (root / "slimrt/explain").iterdir() if f.is_file() and f.suffix != ".py"}


@pytest.mark.parametrize(("value", "shown"), [(0.767, "0.767"), (0.00922, "0.00922"), (12.34, "12.3"), (0, "0")])
def test_scores_have_three_digits(value: float, shown: str) -> None:
    assert readable_score(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0123, "12.3 ms"),
        (1.5, "1.50 s"),
        (0.5037, "504 ms"),
        (0.089, "89.0 ms"),
        (0.00012, "0.12 ms"),
        (0.9996, "1.00 s"),
    ],
)
def test_seconds(value: float, shown: str) -> None:
    assert readable_seconds(value) == shown


# -- the terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80])
def test_summary_fits_and_counts(seen: Explanation, width: int) -> None:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        for part in summary(seen):
            console.print(part)
    text = captured.get()
    assert all(len(line) <= width for line in text.splitlines())
    marks = signs(2)
    strip = "".join(marks[b.survived] for b in seen.blocks)
    assert strip in text.replace("\n", "")
    for span in seen.spans():
        assert re.search(rf"^{span.first}-{span.last} +{span.tokens:,} +{span.blocks} ", text, re.MULTILINE)


@pytest.mark.parametrize("cuts", range(8))
def test_every_fate_has_a_sign_of_its_own(cuts: int) -> None:
    assert len(set(signs(cuts))) == cuts + 1


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "doc.txt").write_text(DOCUMENT, encoding="utf-8")
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("x" * 3000)
    return tmp_path


def run(
    model: Path, folder: Path, options: tuple[str, ...] = (), file: str = "doc.txt", question: str = HOSTILE
) -> Result:
    command = ["explain", "-m", model, "-f", folder / file, "-q", question, "-t", "1", "-o", folder / "page.html"]
    return CliRunner().invoke(cli, [*map(str, command), *options])


def test_command(model: Path, files: Path) -> None:
    result = run(model, files, ("--prune", str(files / "plan.json")))
    assert result.exit_code == 0, result.output
    assert "dropped after layer 1:" in result.stdout and "KV resident" in result.stdout
    assert "page.html" in result.stderr
    page = Page((files / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.blocks).startswith("<|im_start|>user\nthe <b>world")  # through the chat template
    assert {path.name for path in files.iterdir()} == {"doc.txt", "plan.json", "latin.txt", "long.txt", "page.html"}


def test_nothing_is_overwritten_unasked(model: Path, files: Path) -> None:
    (files / "page.html").write_text("old")
    document = (files / "doc.txt").read_bytes()
    refused = run(model, files)
    assert refused.exit_code == 1 and "page.html: exists already" in refused.stderr and "--force" in refused.stderr
    for options in ((), ("--force",)):
        same = run(model, files, ("-o", str(files / "doc.txt"), *options))
        assert same.exit_code == 1 and "source and result are the same file" in same.stderr
    assert (files / "page.html").read_text() == "old" and (files / "doc.txt").read_bytes() == document
    assert run(model, files, ("--force",)).exit_code == 0
    assert (files / "page.html").read_text() != "old"


def test_json_and_plain(model: Path, files: Path) -> None:
    result = run(model, files, ("--prune", str(files / "plan.json"), "--plain", "--json"))
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert "".join(b["text"] for b in data["blocks"]) == DOCUMENT.rstrip() + "\n\n" + HOSTILE
    assert data["cuts"][0]["tokens_before"] == data["tokens"] == sum(b["tokens"] for b in data["blocks"])
    assert len(data["layers"]) == 6 and data["page"] == str(files / "page.html")
    assert data["blocks"][0]["fate"] == "kept to the end"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "none.txt"}, "No such file or directory"),
        ({"file": "latin.txt"}, "byte 3 (0xe9) is not valid UTF-8"),
        ({"file": "long.txt"}, "the context holds 2048"),
        ({"question": "  "}, "--question: no text in it"),
        ({"options": ("--prune", "none.json")}, "prune 'none.json'"),
        ({"options": ("-o", "/no/such/page.html")}, "/no/such/page.html: the folder /no/such does not exist"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_the_page(model: Path, files: Path, change: dict, said: str) -> None:
    (files / "page.html").write_text("old")
    before = sorted(files.iterdir())
    options = change.get("options", ())
    result = run(model, files, **{**change, "options": (*options, "--force")})
    assert result.exit_code == 1 and result.stdout == ""
    told = without_backend_note(result.stderr)
    assert said in told and len(told.strip().splitlines()) == 1
    assert (files / "page.html").read_text() == "old" and sorted(files.iterdir()) == before
