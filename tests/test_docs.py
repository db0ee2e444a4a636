"""Links between the project's own pages lead somewhere, in the repository; ``make docs`` checks those of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.method_picture import WIDTH, picture

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels_cu").glob("*.md")],
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"(?ms)^```.*?^```|`[^`\n]*`")


def headings(text: str) -> set[str]:
    """The anchors of a page: its headings, as both GitHub and MkDocs spell them for plain words."""
    lines = re.findall(r"(?m)^#+ +(.+)$", _CODE.sub(lambda m: m[0] if "\n" not in m[0] else "", text))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in lines}


def broken(page: Path, text: str) -> list[str]:
    """Links of ``text`` that lead nowhere, as seen from ``page``."""
    wrong = []
    for target in _LINK.findall(_CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text("utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text("utf-8")) == []


def test_broken_links_are_found() -> None:
    text = "[a](design.md) [b](nothing.md) [c](design.md#2-architecture) [d](design.md#nothing) `[e](code.md)`"
    assert broken(ROOT / "docs" / "x.md", text) == ["nothing.md", "design.md#nothing"]


def test_every_page_is_in_the_navigation() -> None:
    """MkDocs says so too, but only ``make docs`` runs it."""

    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in names(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert written - set(names(nav)) == set()


def test_the_picture_of_the_method_shows_what_each_layer_computed() -> None:
    report = {
        "tokens": 256, "block": 64, "layers": [{}] * 3, "cuts": [{"layer": 1, "blocks_after": 3}],
        "blocks": [{"survived": survived} for survived in (1, 0, 1, 1)],
    }  # fmt: skip
    drawn = re.findall(r'<rect class="(\w+)" x="[\d.]+" y="(\d+)" width="([\d.]+)"', picture(report))
    tops = sorted({int(y) for _, y, _ in drawn})
    computed = [sum(float(w) for kind, y, w in drawn if kind == "in" and int(y) == top) for top in tops]
    assert computed == [WIDTH, WIDTH, WIDTH * 3 / 4]  # a cut comes behind its layer's attention
