"""The tests on lesser processors than this one: Numba is told to leave instructions out, down to NumPy alone.

python scripts/masked.py            # what depends on instructions, for each set: CI's part
python scripts/masked.py --all      # the whole suite for each set
python scripts/masked.py --list     # the sets that differ on this processor
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
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


def sets() -> dict[str, dict[str, str]]:
    """Environments by name, without those in which this processor would compute as in the one before."""
    import llvmlite.binding as llvm

    present = {name for name, has in llvm.get_host_cpu_features().items() if has}
    found, last = {}, present
    for name, prefixes in LEFT_OUT.items():
        left = {feature for feature in present if not feature.startswith(prefixes)}
        if left == last:
            continue
        last = left
        features = ",".join([f"+{feature}" for feature in sorted(left)] + [f"-{f}" for f in sorted(present - left)])
        found[name] = {"NUMBA_CPU_NAME": llvm.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole suite")
    parser.add_argument("--list", action="store_true", help="names of the sets only")
    options = parser.parse_args()
    failed = []
    for name, environment in sets().items():
        print(f"== pytest, {name}", flush=True)
        if options.list:
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *(() if options.all else CHEAP)]
        if subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
