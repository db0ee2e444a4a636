"""Whether a wheel and an sdist do what they are for: each is installed into an empty environment and answers a chat.

    python scripts/check_dist.py dist/slimrt-0.1.0-py3-none-any.whl dist/slimrt-0.1.0.tar.gz

The dependencies come through pip, the model from the user's cache (or it is fetched). Nothing of the checkout is on the
path: the commands run in a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def run(command: list[str | Path], folder: Path, limit: int, **how: str) -> str:
    """Standard output of ``command``; raises CalledProcessError where it fails, after what it said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=limit,
        **how,
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()
    return done.stdout


def check(package: Path) -> str:
    """Install ``package`` into an empty environment and talk to it; what it answered, in one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        run([programs / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", package], folder, 900)
        version = run([programs / "slimrt", "--version"], folder, 60).strip()
        where = run([programs / "python", "-c", "import slimrt; print(slimrt.__file__)"], folder, 60)
        if not Path(where.strip()).is_relative_to(folder.resolve()):
            raise SystemExit(f"{package.name}: slimrt was imported from {where.strip()}, not from the environment")
        said = run(
            [programs / "slimrt", "generate", "--chat", "--json", "--max-tokens", "12", "Name a colour."],
            folder, 600,
        )  # fmt: skip
        answer = json.loads(said)["text"]
        talk = run([programs / "slimrt", "chat", "--max-tokens", "8"], folder, 600, input="Say hello.\n")
        if not answer.strip() or not talk.strip():
            raise SystemExit(f"{package.name}: no answer; generate said {answer!r}, chat said {talk!r}")
    return f"{package.name}: {version}; {answer.strip()!r}; {talk.strip()!r}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+")
    for package in parser.parse_args().packages:
        print(check(package.resolve()), flush=True)


if __name__ == "__main__":
    main()
