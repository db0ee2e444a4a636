"""What ``gpu_attention_check`` compiles and runs: cubins by source and macros, problems small and large, variants."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES, PROBES = ROOT / "kernels_cu", ROOT / "tests" / "gpu" / "hopper_probes.cu"
BUILT = ROOT / "build" / "wgmma"
WAIT_LIMIT = 300_000_000  # clock cycles, 0.2 s: then a wait for a barrier in shared memory is given up

TOOLS = r"""
#include "ptx.cuh"
__device__ unsigned mixed(unsigned long long x) {  // splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return unsigned((x ^ x >> 31) >> 32);
}
extern "C" __global__ void fill(T* out, long long count, unsigned long long seed, float scale) {
    const long long step = gridDim.x * (long long)blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += step) {
        const float u = (mixed(seed + 2 * i) + 0.5f) * 2.3283064e-10f, v = mixed(seed + 2 * i + 1) * 2.3283064e-10f;
        out[i] = from_float<T>(scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
    }
}
extern "C" __global__ void count_not_finite(const unsigned short* x, long long count, unsigned exponent,
                                            unsigned* found) {
    const long long step = gridDim.x * (long long)blockDim.x;
    unsigned mine = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += step)
        mine += (x[i] & exponent) == exponent;
    if (mine) atomicAdd(found, mine);
}
"""


# -- building ---------------------------------------------------------------------------------------------------------


def pasted(code: str) -> str:
    """``code`` with the headers of ``kernels_cu`` in the place of their first includes."""
    seen: set[str] = set()

    def replace(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return ""
        seen.add(name)
        return paste((SOURCES / name).read_text())

    def paste(text: str) -> str:
        return re.sub(r'^#include "([\w.]+)"$', replace, text, flags=re.MULTILINE)

    return paste(code)


Build = tuple[str, tuple[tuple[str, object], ...]]  # source, macros


def build_of(source: str, **macros: object) -> Build:
    return source, tuple(sorted(macros.items()))


def path_of(build: Build) -> tuple[Path, str, list[str]]:
    source, macros = build
    code = TOOLS if source == "tools" else (PROBES if source == "probes" else SOURCES / f"{source}.cu").read_text()
    code = pasted(code)
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    key = hashlib.sha256("\0".join([code, *options]).encode()).hexdigest()[:20]
    return BUILT / f"{source}-{key}.cubin", code, options


def compile_one(build: Build) -> Path:
    """The cubin of ``build``, by nvcc unless it is there."""
    path, code, options = path_of(build)
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        text, fresh = path.with_suffix(".cu"), path.with_suffix(".new")
        text.write_text(code)
        command = ["nvcc", "-cubin", *options, "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
        done = subprocess.run([*command, str(text), "-o", str(fresh)], capture_output=True, text=True)
        said = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"nvcc: {build}: {said[-800:]}")
        for line in said.splitlines():  # serialised products, setmaxnreg ignored, registers spilled
            if re.search(r"\(C75|[1-9]\d* bytes spill", line):
                print(f"{build}: {line.strip()}", flush=True)
        fresh.replace(path)
    return path


# -- what is run ------------------------------------------------------------------------------------------------------

PROBE_SIZES = [
    {"T": kind, "COLUMNS": columns, "DEPTH": depth}
    for kind, columns, depth in (
        ("f16", 64, 64),
        ("f16", 128, 64),
        ("f16", 64, 128),
        ("f16", 128, 128),
        ("bf16", 128, 128),
    )
]


class Case:
    """One attention problem; ``more``: macros."""

    def __init__(self, tokens: int, keys: int, heads: int, kv_heads: int, dh: int, kind: str,
                 reach: tuple[int, ...] | None = None, **more: object) -> None:  # fmt: skip
        self.tokens, self.keys, self.heads, self.kv_heads = tokens, keys, heads, kv_heads
        self.dh, self.kind, self.reach, self.more = dh, kind, reach, more

    def __str__(self) -> str:
        window = "" if self.reach is None else f" reach {','.join(map(str, self.reach))}"
        more = "".join(f" {name}={value}" for name, value in self.more.items())
        return f"T{self.tokens} N{self.keys} H{self.heads}/{self.kv_heads} Dh{self.dh} {self.kind}{window}{more}"


SIMPLE = {"STAGES": 1, "PING_PONG": 0}
CASES = [  # small, the simplest machinery first
    Case(128, 128, 1, 1, 64, "f16", **SIMPLE),
    Case(256, 256, 1, 1, 128, "f16", **SIMPLE),
    Case(700, 700, 2, 1, 128, "f16", STAGES=2, PING_PONG=0),
    Case(700, 700, 2, 1, 128, "f16"),
    Case(1000, 1000, 2, 1, 64, "f16"),
    Case(65, 700, 4, 2, 128, "f16"),
    Case(700, 1500, 4, 2, 64, "bf16"),
    Case(130, 1333, 4, 2, 128, "bf16"),
    Case(1, 777, 2, 1, 128, "f16"),
    Case(1500, 1500, 4, 4, 128, "f16", (0, 128, 192, 320)),
    Case(900, 1700, 2, 2, 64, "bf16", (64, 512)),
    Case(700, 700, 2, 1, 128, "f16", STAGES=3),
]
LARGE = [
    Case(16384, 16384, 32, 8, 128, "f16"),
    Case(16384, 16384, 32, 8, 64, "f16"),
    Case(16301, 16301, 32, 8, 128, "bf16"),
    Case(5003, 16301, 32, 8, 128, "f16"),
    Case(16384, 16384, 32, 8, 128, "f16", (0, 1024, 0, 4096, 64, 128, 2048, 0)),
    Case(65536, 65536, 32, 8, 128, "f16"),
    Case(65536, 65536, 32, 8, 64, "bf16"),
    Case(32771, 65536, 32, 8, 128, "bf16", (0, 1024, 0, 4096, 64, 128, 2048, 0)),
]
LENGTHS = (16384, 32768, 65536)
TIMED = [Case(0, 0, 32, 8, 128, "f16"), Case(0, 0, 32, 8, 128, "bf16"), Case(0, 0, 32, 8, 64, "f16")]


def variants(case: Case) -> list[dict[str, object]]:
    """Macros of the kernel to be timed against each other; the first is the kernel as it is."""
    return [{}] if case.kind == "bf16" else [{}, {"STAGES": 3}, {"PING_PONG": 0}, {"STAGES": 3, "PING_PONG": 0}]


def kernel_of(case: Case, **variant: object) -> Build:
    """For checks: with a limit to waits; where a ``variant`` or no size is given, to be timed: without."""
    macros = {"STAGES": 2, **case.more, **variant}
    if case.keys:
        macros["WAIT_LIMIT"] = WAIT_LIMIT
    return build_of("attention_wgmma", T=case.kind, DH=case.dh, **macros)


def mma_of(case: Case) -> Build:
    return build_of("attention_prefill", T=case.kind, DH=case.dh, TILE=128, STAGES=2)


def all_builds() -> list[Build]:
    builds = [build_of("tools", T=kind) for kind in ("f16", "bf16")]
    builds += [build_of("probes", **macros) for macros in PROBE_SIZES]
    builds += [kernel_of(case) for case in CASES] + [kernel_of(case) for case in LARGE]
    builds += [kernel_of(case, **variant) for case in TIMED for variant in variants(case)]
    builds += [mma_of(case) for case in TIMED]
    return list(dict.fromkeys(builds))
