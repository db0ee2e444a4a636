"""What ``make docs`` adds to the pages of docs/: files that lie elsewhere in the repository become pages as well.

Links between them are written so that they hold in the repository; here they become those of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # page of the site -> its file, from the root of the repository
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "kernels_cu/README.md",
}
_LINK = re.compile(r"(\]\()([^)#:\s]+\.md)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    place = page.file.src_uri
    source = ELSEWHERE.get(place, f"docs/{place}")
    pages = {file: name for name, file in ELSEWHERE.items()}

    def target(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        name = pages.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if name is None:
            return match[0]  # no page of the site: the check of links says so
        return f"{match[1]}{posixpath.relpath(name, posixpath.dirname(place) or '.')}{match[3] or ''})"

    return _LINK.sub(target, markdown)
