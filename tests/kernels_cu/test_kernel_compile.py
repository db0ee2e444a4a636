"""Every kernel through NVRTC: no spills, registers and shared memory within bounds, the instructions that were meant.
Needs no GPU and no driver, only NVIDIA's wheels (dependency group ``dev``).

There are a hundred and fifty variants and three architectures. Of each source one variant a 16-bit type is compiled for
the newest, and of all variants a third for one architecture each, in turns; ``SLIMRT_ALL_KERNELS=1`` compiles
everything for all, which takes minutes: for whoever changes a kernel.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from slimrt.ops.cuda import gemv
from slimrt.ops.cuda.checked import HEAD_WIDTHS
from slimrt.ops.cuda.device import CudaDevice
from slimrt.ops.cuda.modules import ARCHITECTURES as EXACT
from slimrt.ops.cuda.modules import source_text
from slimrt.ops.cuda.prefill import prefill_kernel
from slimrt.ops.cuda.weights import CELLS
from tests.emulation import EXPORTED, SOURCES

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
PREFILL_TILES = {"sm_80": (128, 1), "sm_89": (64, 1), "sm_90": (128, 2)}  # rows, stages: as CupyOps chooses
SHARED_PER_BLOCK = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # the most that may be asked for
SHARED_PER_BLOCK["sm_90a"] = SHARED_PER_BLOCK["sm_90"]
HOPPER = CudaDevice("", (9, 0), 80 << 30, 80 << 30, 132, SHARED_PER_BLOCK["sm_90"], 13000, 13000, "")
RESERVED = 1024  # of which the system takes this much for itself, and -res-usage counts it

# What CuPy adds to the options of a RawModule (cupy/cuda/compiler.py, 14.2); CubinModule adds nothing.
CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SIXTEEN = ("f16", "bf16")
TENSOR_CORES = {"f16": "HMMA.16816.F32", "bf16": "HMMA.16816.F32.BF16"}

# source, macros, threads a block, dynamic shared bytes, registers that a thread may have, instructions to be found
Case = tuple[str, dict[str, object], int, int, int, tuple[str, ...]]


def cases(architecture: str) -> list[Case]:
    result: list[Case] = []
    result.append(("compact.cu", {}, 128, 0, 64, ()))
    result.append(("merge.cu", {}, 256, 0, 40, ()))
    result.append(("choose.cu", {}, 256, 4 * 256 + 8192, 64, ()))
    for kind in SIXTEEN:
        for source in ("rmsnorm.cu", "rope.cu", "swiglu.cu", "kv_append.cu", "unit_means.cu", "kv_blocks.cu",
                       "elements.cu", "norm_heads.cu"):  # fmt: skip
            result.append((source, {"T": kind}, 256, 0, 40, ()))
        for dh in HEAD_WIDTHS:
            if dh in (96, 256) and kind == "bf16":
                continue  # nothing that the other widths do not show
            seen = (TENSOR_CORES[kind], "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128")
            attends = (*seen, "LDSM.16.MT88.4", "MUFU.EX2")
            defines = {"T": kind, "DH": dh}
            result.append(("block_scores.cu", defines, 128, 128 * dh + 16640, 96, seen))
            warps = 2 if dh > 128 else 4
            decode = (32 * warps, 128 * warps * dh, 168 if dh <= 128 else 255, attends)
            result.append(("attention_decode.cu", defines, *decode))
            if kind == "f16" and dh >= 128:
                limited = {**defines, "WINDOWED": 1, **({"CAPPED": 1} if dh == 256 else {})}
                result.append(("attention_decode.cu", limited, *decode))
            tile, stages = PREFILL_TILES[architecture] if dh <= 128 else (64, 1)
            shared = 2 * dh * (tile + 128 * stages)
            alone = dh == 256 and architecture != "sm_90"
            assert alone or 2 * (shared + RESERVED) <= SHARED_PER_BLOCK[architecture] + RESERVED, (
                "two blocks fit at once"
            )
            macros = {**defines, "TILE": tile, "STAGES": stages}
            registers = 255 if tile == 128 or dh == 256 else 168
            result.append(("attention_prefill.cu", macros, 128, shared, registers, attends))
            if kind == "f16":  # of windows, and of windows and caps, each in one width
                windowed = {**macros, "WINDOWED": 1} if dh in (96, 128) else {**macros, "WINDOWED": 1, "CAPPED": 1}
                result.append(("attention_prefill.cu", windowed, 128, shared, registers, attends))
                if dh == 128:
                    result.append(("attention_prefill.cu", {**macros, "PLACED": 1}, 128, shared, registers, attends))
    for type_ in TYPES:
        result.append(("embed.cu", {"TYPE": type_}, 256, 0, 64, ()))
        if type_ in CELLS:
            result.append(("repack.cu", {"TYPE": type_}, 128, 0, 64, ()))
        for kind in SIXTEEN if type_ in ("BF16", "Q4_0", "Q6_K") else ("f16",):
            result.append(("dequantize.cu", {"TYPE": type_, "T": kind}, 64, 0, 64, ()))
            for out in ("float", kind) if type_ == "Q4_0" else ("float",):  # only the last store differs
                macros = {"TYPE": type_, "T": kind, "OUT": out}
                result.append(("gemm_few.cu", macros, 256, 0, 80, (TENSOR_CORES[kind],)))
            cores = TENSOR_CORES["bf16" if type_ == "BF16" and kind == "bf16" else "f16"]
            seen = (cores, "LDGSTS.E.BYPASS.128", "LDS.128")
            for width, source in ((4096, "float"), (14336, kind)):
                count, blocks = gemv.stages(type_, width, SHARED_PER_BLOCK[architecture])
                macros = {"TYPE": type_, "T": kind, "FROM": source, "STAGES": count}
                shared = gemv.shared_bytes(type_, width, count)
                registers = 128 if blocks == 2 else 168
                result.append(("gemv.cu", {**macros, "OUT": "float"}, 256, shared, registers, seen))
                if source == "float" and type_ in ("BF16", "Q4_0", "Q6_K"):
                    result.append(("gemv_gated.cu", macros, 256, shared, registers, seen))
                    result.append(("gemv_heads.cu", macros, 256, shared, registers, seen))
    return result


def hopper_cases() -> list[Case]:
    """What is compiled for sm_90a alone, as PrefillKernel has it."""
    result: list[Case] = []
    for kind, dh, more in (
        ("f16", 128, {"WINDOWED": 1, "CAPPED": 1}), ("bf16", 64, {}), ("f16", 128, {"PLACED": 1}),
        *((("bf16", 128, {}), ("f16", 64, {}), ("f16", 128, {}), ("f16", 128, {"WINDOWED": 1})) if EVERYTHING else ()),
    ):  # fmt: skip
        product = "F32.BF16" if kind == "bf16" else "F32"
        seen = (
            f"HGMMA.64x128x16.{product} ",
            f"HGMMA.64x{dh}x16.{product} ",
            "USETMAXREG.DEALLOC",
            "USETMAXREG.TRY_ALLOC",
        )
        kernel = prefill_kernel(HOPPER, wgmma=True)
        macros = {"T": kind, "DH": dh, **kernel.macros(), **more}
        loads = ("LDGSTS.E.BYPASS.128", "MUFU.EX2")
        result.append((f"{kernel.source}.cu", macros, kernel.threads, kernel.shared(dh), 168, (*seen, *loads)))
    return result


EVERYTHING = bool(os.environ.get("SLIMRT_ALL_KERNELS"))


def chosen(architecture: str, turn: int) -> list[Case]:
    """For the newest the first variant of each source and 16-bit type, for its instructions too; of the others every
    ninth, which are other ones for each architecture."""
    result, seen = [], set()
    for number, case in enumerate(cases(architecture)):
        source, defines, *rest, _ = case
        first = (source, defines.get("T")) not in seen
        seen.add((source, defines.get("T")))
        if EVERYTHING or (first and architecture == ARCHITECTURES[-1]):
            result.append(case)
        elif number % 9 == 3 * turn:
            result.append((source, defines, *rest, ()))  # type: ignore[arg-type]
    return result


CASES = [(architecture, case) for turn, architecture in enumerate(ARCHITECTURES) for case in chosen(architecture, turn)]
CASES += [("sm_90a", case) for case in hopper_cases()]


@functools.cache
def toolchain() -> tuple[ctypes.CDLL, Path] | str:
    """NVRTC and cuobjdump from the wheels, or why not."""
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or []) if package else []:
        for libraries in Path(root).glob("*/lib"):
            for path in sorted(libraries.glob("libnvrtc.so.*")):
                tool = libraries.parent / "bin" / "cuobjdump"
                if tool.exists() and tool.with_name("nvdisasm").exists():
                    return ctypes.CDLL(str(path)), tool
    return "compiling kernels needs the wheels nvidia-cuda-nvrtc, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"


def compile_source(nvrtc: ctypes.CDLL, code: str, options: Sequence[str]) -> bytes:
    """CUDA source -> cubin; fails the test with NVRTC's log, which holds warnings too."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None) == 0
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0 and not log.value.strip(), log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw[: size.value]


def name_of(value: str | Case) -> str:
    return value if isinstance(value, str) else "-".join([value[0][:-3], *map(str, value[1].values())])


@pytest.mark.parametrize(("architecture", "case"), CASES, ids=name_of)
def test_compiles_within_its_resources(architecture: str, case: Case, tmp_path: Path) -> None:
    tools = toolchain()
    if isinstance(tools, str):
        pytest.skip(tools)
    nvrtc, cuobjdump = tools
    source, defines, threads, shared, most_registers, instructions = case
    code = source_text(source)
    options = ["-std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items())), f"-arch={architecture}"]
    if architecture not in EXACT.values():
        options += CUPYS_OPTIONS
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_source(nvrtc, code, options))
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def told(*command: str | Path) -> str:
        return subprocess.run([*command, cubin], capture_output=True, text=True, check=True, env=environment).stdout

    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told(cuobjdump, "-res-usage")
    )
    assert {name for name, *_ in usage} == set(EXPORTED.findall(code))
    for name, *numbers in usage:
        registers, stack, static, local = map(int, numbers)
        assert stack == local == 0, f"{name} spills: {stack} bytes of stack, {local} local"
        assert registers <= most_registers, name
        assert -(-registers // 8) * 8 * threads <= 65536, f"{name}: the registers of a block exceed the processor's"
        reserved = RESERVED if architecture.startswith("sm_90") else 0
        assert static + shared - reserved <= SHARED_PER_BLOCK[architecture], name
    if instructions:
        machine_code = told(cuobjdump.with_name("nvdisasm"), "-ndf", "-c")
        assert [wanted for wanted in instructions if wanted not in machine_code] == []


def test_every_kernel_is_compiled_and_in_the_contract() -> None:
    """``kernels_cu/README.md`` gives each exported kernel with as many arguments as it takes."""
    listed = dict(re.findall(r"`(\w+)\(([^`]*)\)`", (SOURCES / "README.md").read_text()))
    assert {path.name for path in SOURCES.glob("*.cu")} == {case[0] for _, case in CASES}
    found = set()
    for path in SOURCES.glob("*.cu"):
        code = path.read_text()
        for name in EXPORTED.findall(code):
            found.add(name)
            parameters = re.search(rf"\b{name}\(((?:const |unsigned |long )*\w+[^)]*)\)\s*{{", code)
            assert parameters is not None
            counts = [len(re.sub(r"\[[^]]*\]", "", text).split(",")) for text in (parameters[1], listed[name])]
            assert counts[0] == counts[1], name
    assert found == set(listed)
