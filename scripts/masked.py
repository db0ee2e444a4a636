"""The tests on lesser processors than this one: Numba is told to leave instructions out, down to NumPy alone.

python scripts/masked.py                    # what depends on instructions, for each set
python scripts/masked.py --all              # the whole suite for each set
python scripts/masked.py --list             # the sets that differ on this processor
python scripts/masked.py --only NumPy tests/llama_cpp -k agree       # one set, these tests: what CI runs
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the best processor to none at all; each set leaves out what the ones before it leave out too.
LEFT_OUT = {
    "no AMX": ("amx-",),
    "no BF16": ("amx-", "avx512bf16"),
    "no VNNI": ("amx-", "avx512bf16", "avx512vnni", "avxvnni"),
    "AVX2": ("amx-", "avx512", "avxvnni"),
    "NumPy": ("amx-", "avx"),
}
CHEAP = (
    "tests/llama_cpp", "tests/test_session.py", "tests/ops/fast/test_fast_engine.py",
    "-k", "agree or scores or states or bits or threads or follow or continue",
)  # fmt: skip


def sets(only: str | None = None) -> dict[str, dict[str, str]]:
    """Environments by name: those in which this processor computes otherwise than in the one before, or only one."""
    import llvmlite.binding as llvm

    present = {name for name, has in llvm.get_host_cpu_features().items() if has}
    found, last = {}, present
    for name, prefixes in LEFT_OUT.items():
        left = {feature for feature in present if not feature.startswith(prefixes)}
        if (left == last) if only is None else (name != only):
            continue
        last = left
        features = ",".join([f"+{feature}" for feature in sorted(left)] + [f"-{f}" for f in sorted(present - left)])
        found[name] = {"NUMBA_CPU_NAME": llvm.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all passed, 1 where a set failed or there is none to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole suite")
    parser.add_argument("--list", action="store_true", help="names of the sets only")
    parser.add_argument("--only", choices=LEFT_OUT, help="this set, also where it leaves out nothing")
    options, tests = parser.parse_known_args(arguments)
    failed = []
    for name, environment in sets(options.only).items():
        if options.list:
            print(name)
            continue
        chosen = tests or (() if options.all else CHEAP)
        print(f"== pytest {shlex.join(chosen)}, {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *(() if tests else ("-n", "2")), *chosen]
        if subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
