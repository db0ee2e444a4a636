"""Programs that people have, against ``slimrt serve`` as it is run: ``make clients``.

Every program of examples/clients and the plugin for ``llm`` talk to the default model. Schemathesis sends requests of
every shape to a server of a tiny random model, and so does a crowd of ill-behaved clients (scripts/crowd.py). A batch
runs on a Ray cluster of two nodes on this machine, one of which dies. Ends with status 1 where one of them failed,
after its output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.browser import chromium
from tests.tiny_gguf import write_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent
# Left out: an answer for whatever fits the description. What messages may follow each other, and which token ids and
# stops there are, is beyond a schema.
STEPS = ("examples", "page", "llm", "ray", "schemathesis", "crowd")
LEFT_OUT = "positive_data_acceptance"


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``slimrt serve`` and its address."""
    command = [PROGRAMS / "slimrt", "serve", "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"slimrt serve said {line!r}")
        yield server, line.split(" at ")[1].split()[0]
    finally:
        server.terminate()
        server.wait(30)


def run(name: str, command: Sequence[str | Path], limit: int, place: str | Path = ROOT, **environment: str) -> bool:
    """Run one program in ``place`` and show what it says; whether it ended well."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    try:
        status: int | str = subprocess.run(
            command, env={**os.environ, **environment}, cwd=place, timeout=limit
        ).returncode
    except subprocess.TimeoutExpired:
        status = f"none within {limit} s"
    print(f"   status {status}, {time.monotonic() - began:.1f} s", flush=True)
    return status == 0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=STEPS)
    parser.add_argument("--max-examples", type=int, default=40, help="of schemathesis, for each operation")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    wanted = options.only or STEPS
    failed = []

    def note(name: str, ended_well: bool) -> None:
        if not ended_well:
            failed.append(name)

    with tempfile.TemporaryDirectory() as folder:
        if "examples" in wanted:
            with serving("--ctx", "2k") as (_, url):
                for program in sorted((ROOT / "examples" / "clients").glob("*.py")):
                    note(program.name, run(program.name, [sys.executable, program], 300, SLIMRT_URL=url))
        if "page" in wanted:
            if chromium() is None:
                print("== the page: left out, no Chromium is installed")
            else:
                with serving("--ctx", "8k") as (_, url):
                    note("page", run("the page, in Chromium", [sys.executable, "-m", "scripts.browser", url], 900))
        if "llm" in wanted:
            ask = [PROGRAMS / "llm", "-m", "slimrt", "-o", "max_tokens", "20", "-o", "ctx", "2048", "-s", "Be brief."]
            note("llm", run("llm", [*ask, "Name three colours."], 300, LLM_USER_PATH=folder))
            note("llm -c", run("llm, continued", [*ask, "-c", "And one more?"], 300, LLM_USER_PATH=folder))
        if "ray" in wanted:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/batch/test_batch_ray.py"]
            note("ray", run("a batch on a Ray cluster", command, 900))
        if {"schemathesis", "crowd"} & {*wanted}:
            tiny = write_tiny_llama(Path(folder) / "tiny.gguf", n_layers=4, ctx=2048)
            with serving("--model", str(tiny), "--device", "numpy", "--prune", "off", "--threads", "1") as (
                server,
                url,
            ):
                if "schemathesis" in wanted:
                    command = [
                        PROGRAMS / "schemathesis", "run", f"{url}/openapi.json", "--exclude-checks", LEFT_OUT,
                        "--max-examples", str(options.max_examples), "--phases", "examples,coverage,fuzzing",
                        "--request-timeout", "60", "--no-color",
                    ]  # fmt: skip
                    note("schemathesis", run("schemathesis", command, 3600, folder))  # it leaves what it learnt there
                if "crowd" in wanted:
                    command = [
                        sys.executable, "-m", "scripts.crowd", url, "--pid", str(server.pid),
                        "--connections", str(options.connections), "--rounds", str(options.rounds),
                    ]  # fmt: skip
                    note("crowd", run("a crowd of ill-behaved clients", command, 900))
                note("the server", server.poll() is None)
    if failed:
        raise SystemExit(f"== failed: {', '.join(failed)}")
    print("== all clients are content")


if __name__ == "__main__":
    main()
