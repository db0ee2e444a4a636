"""Files of a Hugging Face repository, as ``Llama.from_pretrained`` names them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from slimrt.errors import FetchError
from slimrt.hub import huggingface

__all__ = ["fetched", "matching_file"]


def fetched(
    repo: str, file: str, others: Sequence[str], local_dir: str | Path | None, cache_dir: str | Path | None
) -> Path:
    """``file`` with its other parts, and ``others``, in the folder that is named; the path of ``file``."""
    found = [huggingface.fetched(f"hf:{repo}/{file}", local_dir, cache_dir)]
    found += [huggingface.fetched(f"hf:{repo}/{other}", local_dir, cache_dir) for other in others]
    return found[0]


def matching_file(repo: str, pattern: str) -> str:
    """The file of a Hugging Face repository that matches ``pattern``; a plain name is not looked up."""
    if not any(sign in pattern for sign in "*?["):
        return pattern
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise FetchError(
            'models named by repository need the huggingface_hub package: pip install "slimrt[hf]"'
        ) from error
    try:
        names = HfApi().list_repo_files(repo)
    except (OSError, ValueError, HTTPError) as error:
        raise FetchError(f"repository {repo!r}: {' '.join(str(error).split())}") from error
    found = [name for name in names if fnmatch.fnmatch(name, pattern) and "-of-" not in name] or [
        name for name in names if fnmatch.fnmatch(name, pattern) and "-00001-of-" in name
    ]
    if len(found) != 1:
        files = ", ".join(names)[:500]
        raise FetchError(
            f"repository {repo!r}: {len(found)} files match {pattern!r}, it must be one; there are {files}"
        )
    return found[0]
