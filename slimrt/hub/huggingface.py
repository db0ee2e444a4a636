"""Models of the Hugging Face hub, named ``hf:owner/repo/path/file.gguf``, through the ``huggingface_hub`` package.

That package brings its own cache, which other programs share, its token, ``HF_ENDPOINT``, resumption and locks. It is
an optional dependency: the extra ``slimrt[hf]``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimrt.errors import FetchError

__all__ = ["PREFIX", "cached", "fetched", "models", "pull"]

PREFIX = "hf:"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


def _library() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError as error:
        raise FetchError('models named hf:... need the huggingface_hub package: pip install "slimrt[hf]"') from error
    return huggingface_hub


def _split_name(text: str) -> tuple[str, list[str]]:
    """``hf:owner/repo/path/file.gguf`` -> repository and files; any part of a split model stands for all its parts."""
    owner, _, rest = text.removeprefix(PREFIX).partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file.endswith(".gguf")):
        raise FetchError(f"model {text!r}: must read hf:owner/repo/file.gguf")
    files = _parts(file)
    if not files:
        raise FetchError(f"model {text!r}: no such part can be; parts count from 00001 to the number after -of-")
    return f"{owner}/{repo}", files


def _parts(file: str) -> list[str]:
    """All files of the model that ``file`` is a part of; none if its part number is impossible."""
    split = _PART.match(file)
    if split is None:
        return [file]
    count = int(split["count"])
    if not 1 <= int(split["no"]) <= count:
        return []
    return [f"{split['stem']}-{no:05d}-of-{count:05d}.gguf" for no in range(1, count + 1)]


def cached(text: str) -> Path | None:
    """The (first) file of a model all of whose files are in the cache; the server is not asked."""
    repo, files = _split_name(text)
    hf = _library()
    try:
        paths = [Path(hf.hf_hub_download(repo, file, local_files_only=True)) for file in files]
    except hf.errors.LocalEntryNotFoundError:
        return None
    except ValueError as error:  # not a repository's name
        raise FetchError(f"model {text!r}: {_one_line(error)}") from error
    return paths[0]


def fetched(text: str, local_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Path:
    """All files of a model in a folder of the caller's (``local_dir``), or another cache (``cache_dir``); the first."""
    repo, files = _split_name(text)
    hf = _library()
    where = {name: str(place) for name, place in (("local_dir", local_dir), ("cache_dir", cache_dir)) if place}
    try:
        hf.get_hf_file_metadata(hf.hf_hub_url(repo, files[0]))  # asks once, see pull
        paths = [Path(hf.hf_hub_download(repo, file, **where)) for file in files]
    except (OSError, ValueError, hf.errors.HTTPError) as error:
        raise FetchError(f"model {text!r}: {_one_line(error)}") from error
    return paths[0]


def pull(text: str, progress: Callable[[int, int], None] | None = None, force: bool = False) -> Path:
    """Fetch all files of a model, or those whose version on the server is new; return the (first) file."""
    repo, files = _split_name(text)
    hf = _library()
    try:
        # hf_hub_download asks a server that does not answer again and again for 23 s; this call asks once.
        hf.get_hf_file_metadata(hf.hf_hub_url(repo, files[0]))
        # The sizes first: they give the bar its length, and a part that is missing is found before the first gigabyte.
        plans = [hf.hf_hub_download(repo, file, force_download=force, dry_run=True) for file in files]
        bar = _bar(progress, sum(plan.file_size or 0 for plan in plans if plan.will_download))
        paths = [Path(hf.hf_hub_download(repo, file, force_download=force, tqdm_class=bar)) for file in files]
    except hf.errors.RemoteEntryNotFoundError as error:
        raise FetchError(f"model {text!r}: {repo} has no such file; look at its file list") from error
    except hf.errors.GatedRepoError as error:
        raise FetchError(f"model {text!r}: {repo} is gated; accept its terms, then run `hf auth login`") from error
    except hf.errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"model {text!r}: no repository {repo}; if it is private, run `hf auth login` first"
        ) from error
    except (OSError, ValueError, hf.errors.HTTPError) as error:  # the disk; a name it refuses; network and server
        raise FetchError(f"model {text!r}: {_one_line(error)}; check the network, HF_ENDPOINT and HF_HOME") from error
    for path, plan in zip(paths, plans, strict=True):
        _check(text, path, plan.file_size)
    return paths[0]


def _check(text: str, path: Path, size: int | None) -> None:
    """Raises FetchError for a file that is no model, or not the one that the server announced, and drops it from the
    cache: a proxy's page, an answer that was cut, bytes that changed on the way or on the disk."""
    blob = path.resolve()
    try:
        with blob.open("rb") as file:
            begin = file.read(4)
            file.seek(0)
            # The cache names a large file by the SHA-256 that the server announced.
            digest = hashlib.file_digest(file, "sha256").hexdigest() if _SHA256.fullmatch(blob.name) else blob.name
    except OSError as error:
        raise FetchError(f"{path}: cannot be read ({error.strerror}); check the cache folder (HF_HOME)") from None
    held = blob.stat().st_size
    if begin != b"GGUF":
        problem = f"{held} bytes that begin with {begin!r}; a GGUF file begins with b'GGUF'"
    elif size is not None and held != size:
        problem = f"{held} bytes, the server announced {size}"
    elif digest != blob.name:
        problem = f"its SHA-256 is {digest}, the server announced {blob.name}"
    else:
        return
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise FetchError(
        f"model {text!r}: what came is {problem}; it was not kept; check HF_ENDPOINT and the proxy, then pull it again"
    )


def _bar(progress: Callable[[int, int], None] | None, total: int) -> type:
    """A tqdm class that draws nothing and reports the sum over all files."""
    from tqdm import tqdm  # huggingface_hub's own dependency

    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # a parameter of huggingface_hub's subclass alone
            super().__init__(*args, **(options | {"file": io.StringIO(), "disable": False}))
            self._count(self.n)  # a resumed download starts above 0

        def update(self, n: float | None = 1) -> bool | None:
            self._count(n or 0)
            return super().update(n)

        def _count(self, n: float) -> None:
            nonlocal done
            done += int(n)
            if progress and n:
                progress(done, total)

    return Bar


def models() -> list[tuple[str, Path, int]]:
    """Name, first file and bytes of each complete GGUF model in the cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model" or "/" not in repo.repo_id or not repo.revisions:
            continue
        latest = max(repo.revisions, key=lambda revision: revision.last_modified)
        files = {file.file_path.relative_to(latest.snapshot_path).as_posix(): file for file in latest.files}
        for file in sorted(file for file in files if file.endswith(".gguf")):
            parts = _parts(file)
            if parts and file == parts[0] and files.keys() >= set(parts):
                size = sum(files[part].size_on_disk for part in parts)
                found.append((f"{PREFIX}{repo.repo_id}/{file}", files[file].file_path, size))
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
