"""Threads and the kernels' cache: what happens on a busy machine, after a fork, after an upgrade."""

from __future__ import annotations

import _thread
import ast
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from slimrt.errors import ComputeError
from slimrt.ops.fast import kernels
from slimrt.ops.fast.atomics import atomic_add, cycles, pause
from slimrt.ops.fast.features import NONE, Features, detect
from slimrt.ops.fast.kernels import Kernel, compile_kernel
from slimrt.ops.fast.team import Program, Team, address
from slimrt.ops.fast.vectors import argument, argument_float, load_scalar, store_scalar
from tests.interrupts import interrupted, moments, spread

pytestmark = pytest.mark.skipif(not detect().avx2, reason="this processor has no fast path")


def _count(item, thread, args):  # type: ignore[no-untyped-def]
    """Item i adds 1 to count i, and spends some microseconds, so that other threads come to their turn."""
    begun = cycles()
    while cycles() - begun < argument(args, 1):
        pause()
    atomic_add(argument(args, 0) + 8 * item, 1)
    atomic_add(argument(args, 2) + 8 * thread, 1)


def wait_for(condition: Callable[[], bool]) -> None:
    """On a busy machine a helper gets its turn late, but it does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _double(item, thread, args):  # type: ignore[no-untyped-def]
    at = argument(args, 0) + 8 * item
    store_scalar(at, load_scalar(np.float64, at) * 2.0 + argument_float(args, 1))


@pytest.fixture(scope="module")
def count() -> Kernel:
    return compile_kernel(_count, "test")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    folder = tmp_path / "kernels"
    monkeypatch.setattr(kernels, "cache_folder", lambda: folder)
    monkeypatch.setattr(kernels, "_complained", set())
    return folder


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_item_runs_once_and_jobs_in_order(count: Kernel, threads: int) -> None:
    double = compile_kernel(_double, "test")
    team, program = Team(threads), Program()
    done, by_thread = np.zeros(1000, np.int64), np.zeros(threads, np.int64)
    values = np.ones(50)
    program.add(count, 1000, address(done), 2000, address(by_thread))
    program.add(count, 0, 0, 0, 0)  # no items: nothing is called
    for _ in range(6):
        program.add(double, 50, address(values), 1.0)
    for run in range(1, 4):
        values[:] = 1
        team.run(program)
        assert (done == run).all()
        assert (values == 2**6 + 2**6 - 1).all()
    assert by_thread.sum() == 3000


def test_arguments_and_items_may_change_between_runs(count: Kernel) -> None:
    team, program = Team(2), Program()
    done, other, by_thread = np.zeros(9, np.int64), np.zeros(9, np.int64), np.zeros(2, np.int64)
    words = program.add(count, 9, address(done), 0, address(by_thread))
    team.run(program)
    words[0] = address(other)
    program.table[0, 1] = 4
    team.run(program)
    assert done.tolist() == [1] * 9 and other.tolist() == [1] * 4 + [0] * 5


def test_sleeping_helpers_wake_and_share_the_work(count: Kernel) -> None:
    team, program = Team(2), Program()
    done, by_thread = np.zeros(400, np.int64), np.zeros(2, np.int64)
    program.add(count, 400, address(done), 400_000, address(by_thread))
    deadline = time.monotonic() + 60
    while by_thread[1] == 0:  # on a busy machine a helper gets its turn late, but it does
        assert time.monotonic() < deadline
        team.run(program)
    while team._shared is None or not team._shared.sleeping:  # it finds nothing to do and goes to sleep
        assert time.monotonic() < deadline
        time.sleep(0.01)
    by_thread[:] = 0
    while by_thread[1] == 0:
        assert time.monotonic() < deadline
        team.run(program)


def test_programs_from_several_threads_do_not_mix(count: Kernel) -> None:
    team = Team(2)
    results = []

    def work() -> None:
        done, by_thread, program = np.zeros(64, np.int64), np.zeros(2, np.int64), Program()
        program.add(count, 64, address(done), 100, address(by_thread))
        for _ in range(50):
            team.run(program)
        results.append(bool((done == 50).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_an_interrupted_start_leaves_no_helper(count: Kernel) -> None:
    """Two helpers with one index would share their scratch: every later result could be wrong."""
    total = moments(lambda: Team(3).run(Program()))
    teams = []  # kept: an interrupt that strikes while one is dropped is lost
    for at in spread(total, 60):
        team, program = Team(3), Program()
        teams.append(team)
        done, by_thread = np.zeros(64, np.int64), np.zeros(3, np.int64)
        program.add(count, 64, address(done), 100, address(by_thread))
        interrupted(lambda team=team, program=program: team.run(program), at)
        done[:] = 0
        for _ in range(2):
            team.run(program)
        assert (done == 2).all(), at
        # What works is one helper a number: each of them goes to sleep once, and there is no third.
        assert team._shared is not None
        shared = team._shared
        wait_for(lambda shared=shared: len(shared.sleeping) == 2)
        time.sleep(0.01)
        assert len(team._shared.sleeping) <= 2, at


def test_an_interrupted_wake_is_made_up_for(count: Kernel) -> None:
    team, program = Team(2), Program()
    done, by_thread = np.zeros(64, np.int64), np.zeros(2, np.int64)
    program.add(count, 64, address(done), 100_000, address(by_thread))  # long enough for a helper to wake up
    team.run(program)
    for at in spread(moments(lambda: team.run(program)), 60):
        wait_for(lambda: team._shared is not None and len(team._shared.sleeping) > 0)
        interrupted(lambda: team.run(program), at)
        by_thread[:] = 0

        def helped() -> bool:
            team.run(program)
            return bool(by_thread[1])

        wait_for(helped)


def test_no_thread_to_be_had_is_said_and_passes(count: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    team, program = Team(3), Program()
    done, by_thread = np.zeros(64, np.int64), np.zeros(3, np.int64)
    program.add(count, 64, address(done), 100, address(by_thread))
    start, started = _thread.start_new_thread, []

    def limited(function: Callable[..., object], args: tuple[object, ...]) -> int:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(start(function, args))
        return started[0]

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", limited)
        with pytest.raises(ComputeError, match=r"3 threads: the system starts no more than 2 .*--threads 1") as error:
            team.run(program)
    assert "\n" not in str(error.value)
    assert not done.any()
    team.run(program)
    assert (done == 1).all()


def test_helpers_end_with_their_team() -> None:
    team, program = Team(3), Program()
    team.run(program)
    held = weakref.ref(team._shared)  # by the team and by each helper
    del team
    wait_for(lambda: held() is None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_goes_on_by_itself(count: Kernel) -> None:
    team, program = Team(2), Program()
    done, by_thread = np.zeros(100, np.int64), np.zeros(2, np.int64)
    program.add(count, 100, address(done), 100, address(by_thread))
    team.run(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which is the point here
        child = os.fork()
    if child == 0:
        team.run(program)
        os._exit(0 if (done == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    team.run(program)
    assert (done == 2).all()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_between_two_programs(tmp_path: Path) -> None:
    """KeyboardInterrupt comes when the program that runs has ended, and the process ends without waiting."""
    code = (
        "import sys, numpy as np\n"
        "from slimrt.ops.fast.team import Team, Program, address\n"
        "from slimrt.ops.fast.kernels import compile_kernel\n"
        "from tests.ops.fast.test_fast_team import _count\n"
        "done, by = np.zeros(10, np.int64), np.zeros(2, np.int64)\n"
        "team, program = Team(2), Program()\n"
        "program.add(compile_kernel(_count, 'test'), 10, address(done), 1000000, address(by))\n"
        "try:\n"  # before the parent is told: its signal may come at once
        "    team.run(program); print('ready', flush=True)\n"
        "    while True: team.run(program)\n"
        "except KeyboardInterrupt:\n"
        "    print('whole' if len(set(done)) == 1 else 'broken off', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "whole\n"
    assert process.returncode == 0


# -- the kernels' cache ------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once(cache: Path) -> None:
    compile_kernel(_double, "once")
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    compile_kernel(_double, "once")
    assert [*cache.iterdir()] == [file] and file.stat().st_mtime_ns == stamp
    compile_kernel(_double, "other-key")
    assert len(list(cache.iterdir())) == 2


def test_numbers_from_other_modules_are_in_the_digest() -> None:
    """Whatever a kernel's module imports from elsewhere, and is a number, is compiled into kernels."""
    baked = {module.__name__ for module in kernels.BAKED_IN}
    for source in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("slimrt."):
                module = importlib.import_module(node.module)
                numbers = [
                    name.name for name in node.names if isinstance(getattr(module, name.name, None), (int, float))
                ]
                known = node.module in baked or node.module.startswith("slimrt.ops.fast")
                assert known or not numbers or source.name == "fast_ops.py", (source.name, node.module, numbers)


def test_a_changed_number_of_another_module_has_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (module,) = kernels.BAKED_IN
    before = kernels.cache_folder()
    changed = tmp_path / "reach.py"
    changed.write_text(Path(str(module.__file__)).read_text().replace("RUN = 128", "RUN = 256"))
    monkeypatch.setattr(module, "__file__", str(changed))
    kernels.package_digest.cache_clear()
    after = kernels.cache_folder()
    monkeypatch.undo()
    kernels.package_digest.cache_clear()
    assert before != after and before == kernels.cache_folder()


def test_another_version_of_the_sources_has_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numba looks at the kernel's own file only; a helper's change must count as well."""
    for source in Path(kernels.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    kernels.package_digest.cache_clear()
    before = kernels.cache_folder()
    with (tmp_path / "lanes.py").open("a") as file:
        file.write("# changed\n")
    kernels.package_digest.cache_clear()
    after = kernels.cache_folder()
    monkeypatch.undo()
    kernels.package_digest.cache_clear()
    assert before != after and before == kernels.cache_folder()


def test_folders_of_old_versions_go(cache: Path) -> None:
    old, recent = cache.parent / "old", cache.parent / "recent"
    for folder in (old, recent):
        folder.mkdir()
        (folder / "kernel.nbc").write_text("x")
    os.utime(old, (0, 0))
    compile_kernel(_double, "x")
    assert cache.exists() and recent.exists() and not old.exists()


def test_a_folder_that_cannot_be_used_costs_one_line(cache: Path) -> None:
    cache.write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="cannot be kept here") as seen:
        kernel = compile_kernel(_double, "a")
        compile_kernel(_double, "b")
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    values, program = np.ones(3), Program()
    program.add(kernel, 3, address(values), 0.0)
    Team(1).run(program)
    assert (values == 2).all()


@pytest.mark.parametrize("damage", ["empty", "nonsense", "short", "a bit of the code", "a bit of the checksum"])
def test_a_damaged_cache_is_compiled_anew(cache: Path, damage: str) -> None:
    compile_kernel(_double, "x")
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    if damage in ("empty", "nonsense"):
        data = bytearray(b"" if damage == "empty" else b"nonsense")
    elif damage == "short":
        del data[-20:]
    else:
        data[data.index(b"ELF") + 500 if "code" in damage else 3] ^= 4
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="cannot be kept here"):
        kernel = compile_kernel(_double, "x")
    values, program = np.ones(3), Program()
    program.add(kernel, 3, address(values), 0.0)
    Team(1).run(program)
    assert (values == 2).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_kernel(_double, "x")  # kept again


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system's files have no owner")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_others_could_have_written_is_not_run(cache: Path, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    compile_kernel(_double, "x")
    (file,) = cache.iterdir()
    loaded = []
    monkeypatch.setattr(kernels.pickle, "loads", lambda data: loaded.append(data))
    target = file if whose == "file" else cache
    target.chmod(target.stat().st_mode | 0o020)
    with pytest.warns(UserWarning, match="belongs to another user, or others may write"):
        compile_kernel(_double, "x")
    monkeypatch.setattr("os.geteuid", lambda: target.stat().st_uid + 1)
    if target.stat().st_uid != 0:
        compile_kernel(_double, "x")
    assert not loaded


# -- which path is taken -----------------------------------------------------------------------------------------------


def features_with(monkeypatch: pytest.MonkeyPatch, *names: str) -> Features:
    monkeypatch.setattr("slimrt.ops.fast.features._usable", lambda: set(names))
    detect.cache_clear()
    try:
        return detect()
    finally:
        detect.cache_clear()


def test_features_from_names(monkeypatch: pytest.MonkeyPatch) -> None:
    avx2 = ("avx2", "fma", "f16c")
    avx512 = (*avx2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
    assert features_with(monkeypatch, "sse2") == NONE
    assert features_with(monkeypatch, "avx2", "f16c") == NONE
    assert features_with(monkeypatch, *avx2) == Features(avx2=True)
    assert features_with(monkeypatch, *avx2, "avx512f", "avx512vnni") == Features(avx2=True)
    assert features_with(monkeypatch, *avx512) == Features(avx2=True, avx512=True)
    assert features_with(monkeypatch, *avx512, "avx512vnni") == Features(avx2=True, avx512=True, vnni=True)
    assert features_with(monkeypatch, *avx512, "avx512bf16").bf16
    monkeypatch.setattr("slimrt.ops.fast.features.tiles_granted", lambda: False)
    assert not features_with(monkeypatch, *avx512, "avx512bf16", "amx-tile", "amx-bf16").amx
    monkeypatch.setattr("slimrt.ops.fast.features.tiles_granted", lambda: True)
    assert features_with(monkeypatch, *avx512, "avx512bf16", "amx-tile", "amx-bf16").amx


def inspected(**environment: str) -> str:
    """What another process says that would compute, under ``environment``."""
    code = "from slimrt.ops.backend import describe_backend as d; print(d('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_numba_told_to_use_less_is_obeyed() -> None:
    """Emitting an instruction that Numba's target machine lacks would end the process."""
    assert "'fast'" in inspected(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+f16c,+avx")
    assert "AVX2'" in inspected(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+f16c,+avx")
    assert "'numpy'" in inspected(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")


def test_without_numba_numpy_computes_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimrt.ops.backend import open_backend

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend = open_backend("auto", threads=1)
    assert backend.ops.name == "numpy" and "slimrt[fast]" in backend.why and "\n" not in backend.why


def test_a_numba_that_does_not_load_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimrt.ops.backend import open_backend

    def broken() -> Features:
        raise ImportError("Numba needs NumPy 1.0 or less\nsecond line")

    monkeypatch.setattr("slimrt.ops.fast.features.detect", broken)
    backend = open_backend("cpu", threads=1)
    assert backend.ops.name == "numpy" and "Numba needs NumPy" in backend.why and "\n" not in backend.why
