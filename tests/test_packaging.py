"""The wheel: what lands in a user's site-packages, and that it can be imported from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = {"models": "slimrt/models", "convert": "slimrt/convert", "kernels_cu": "slimrt/kernels_cu"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder appears in the checkout, and none from there gets into the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("slimrt", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("click_cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("slimrt-*.whl")
    return path


def test_only_our_own_names_are_installed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"slimrt", "click_cli.py", f"slimrt-{version}.dist-info"}


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    """pyproject.toml lists the packages one by one: a new one that was forgotten there shows here."""
    expected = {"click_cli.py", "slimrt/py.typed"}
    for top in ("slimrt", *MAPPED):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".json", ".html", ".jinja"):
                expected.add(f"{MAPPED.get(top, top)}/{path.relative_to(ROOT / top).as_posix()}")
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "slimrt = click_cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    """As installed, not as the checkout's own layout would have it."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib.resources, pathlib, click_cli, slimrt, slimrt.models, slimrt.convert\n"
        "for module in (click_cli, slimrt, slimrt.models, slimrt.convert):\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module\n"
        "assert importlib.resources.files('slimrt.kernels_cu').is_dir()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], check=True, timeout=60, cwd=tmp_path)


def test_the_sdist_is_complete(tmp_path: Path) -> None:
    """Whatever is tracked is in it, so that the tests run from an unpacked one."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout to compare with")
    tracked = {name for name in listed.stdout.splitlines() if not name.startswith(".") and (ROOT / name).is_file()}
    source, built = tmp_path / "source", tmp_path / "built"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(built)], cwd=source, check=True, timeout=300, capture_output=True)
    (path,) = built.glob("slimrt-*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - held == set()
