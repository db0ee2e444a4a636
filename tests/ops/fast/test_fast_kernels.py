"""Names of compiled functions: machine code from the cache must not meet a namesake that does something else."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba.core.compiler_lock import global_compiler_lock

from slimrt.ops.fast.features import detect
from slimrt.ops.fast.kernels import compile_kernel, inline
from tests.ops.numpy.test_tasks import forked, needs_fork

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")

# A helper too long to be put in line, so that it keeps a name; the arguments say with which numbers it is made.
PROGRAM = """
import sys
import numpy as np
from slimrt.ops.fast.kernels import compile_kernel, inline
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.vectors import argument, load_scalar, store_scalar
from numba import int64

def kernel(number):
    @inline
    def helper(where):
        total = load_scalar(int64, where)
        for i in range(number, 1000):
            for j in range(i):
                total = (total * 31 + i * j) % 1000003
                if total % 7 == number:
                    total += load_scalar(int64, where)
        return total * 10 + number

    def run(item, thread, args):
        store_scalar(argument(args, 1), helper(argument(args, 0)) % 10 + helper(argument(args, 0) + 8) % 10)

    return compile_kernel(run, str(number))

data, out = np.arange(2), np.zeros(1, np.int64)
for number in map(int, sys.argv[1:]):
    program = Program()
    program.add(kernel(number), 1, address(data), address(out))
    Team(1).run(program)
    assert out[0] == 2 * number, (number, out)
"""


def test_namesakes_from_the_cache(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    for numbers in ("1", "2 1", "3 1 2"):  # each compiles one anew, under the same count, and finds the others
        command = [sys.executable, str(program), *numbers.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@needs_fork
def test_a_fork_while_another_thread_compiles() -> None:
    """The child can compile: it does not wait for ever for a thread that only its parent has."""
    compiling, forking = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        with global_compiler_lock:
            compiling.set()
            forking.wait(10)
            time.sleep(0.2)

    def compile_one() -> bool:
        faulthandler.dump_traceback_later(30, exit=True)
        return compile_kernel(lambda item, thread, args: None, "test").address != 0

    thread = threading.Thread(target=compile_slowly)
    thread.start()
    assert compiling.wait(10)
    forking.set()
    assert forked(compile_one) == 0
    thread.join()


def test_a_closure_is_named_by_what_it_holds() -> None:
    def made(value: object) -> str:
        def function() -> object:
            return value

        return inline(function).py_func.__qualname__

    values: list[object] = [1, 2, 1.0, "1", None, (1, 2), detect(), detect().without("avx2")]
    names = [made(value) for value in values]
    assert names == [made(value) for value in values]
    assert len(set(names)) == len(values)
    with pytest.raises(TypeError, match="cannot say"):
        made(object())
