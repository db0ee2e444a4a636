"""A checkout that runs where it lies: the installed names of its folders, and what is missing beside it.

A machine with a card is often lent, without a network: nothing is installed there. ``models/``, ``convert/`` and
``kernels_cu/`` get the names that the wheel gives them (pyproject.toml, package-dir) by an import hook, and missing
packages are named in one line, with the way they travel.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

__all__ = ["ROOT", "install", "missing_packages", "remedy"]

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {f"slimrt.{name}": ROOT / name for name in ("models", "convert", "kernels_cu")}
FOR_TESTS = ("pytest", "hypothesis", "numba")  # beside the product's own dependencies
REQUIRED = {  # what those need in turn: of a package that is not here, nothing else can tell
    "cupy-cuda13x": ("cuda-pathfinder",),
    "gguf": ("requests", "tqdm"),
    "hypothesis": ("sortedcontainers",),
    "jinja2": ("markupsafe",),
    "markdown-it-py": ("mdurl",),
    "numba": ("llvmlite",),
    "pytest": ("iniconfig", "packaging", "pluggy", "pygments"),
    "requests": ("certifi", "charset-normalizer", "idna", "urllib3"),
    "rich": ("markdown-it-py", "pygments"),
}


class _Folders(MetaPathFinder):
    """Finds the packages of ``FOLDERS`` where the checkout has them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Make ``slimrt`` and its packages importable from this checkout, before whatever is installed. Twice is once."""
    if not any(isinstance(finder, _Folders) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Folders())
        sys.path.insert(0, str(ROOT))


def missing_packages(*, cupy: bool) -> list[str]:
    """Distributions that the steps need and this Python lacks; ``cupy``: whether CuPy counts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [re.split(r"[^\w.-]", entry, maxsplit=1)[0] for entry in project["dependencies"]] + list(FOR_TESTS)
    for name in needed:  # grows meanwhile
        needed += [other for other in REQUIRED.get(name, ()) if other not in needed]
    absent = [name for name in needed if not _present(name)]
    if cupy and importlib.util.find_spec("cupy") is None:
        absent += ["cupy-cuda13x", *(name for name in REQUIRED["cupy-cuda13x"] if not _present(name))]
    return absent


def _present(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def remedy(missing: Sequence[str]) -> str:
    """One line: what is missing, and how it travels to a machine without a network."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"missing packages: {', '.join(missing)}; where there is a network: pip download --no-deps "
        f"--only-binary=:all: --python-version {version} -d wheels {' '.join(missing)}; here: python3 -m pip install "
        "--no-index --no-deps --target site wheels/*.whl, and PYTHONPATH=site"
    )
