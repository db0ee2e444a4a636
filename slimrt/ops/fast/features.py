"""What the processor can do, asked before anything is emitted: an instruction it lacks would end the process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from slimrt.ops.fast.amx import tiles_granted

__all__ = ["NONE", "Features", "detect"]

_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Features:
    """What kernels may use. Masking one (``dataclasses.replace``) gives what a lesser processor would be given."""

    avx2: bool = False  # with fma and f16c: without these there is no fast path
    avxvnni: bool = False  # int8 dot products of 256 bits (vpdpbusd), where there is no AVX-512
    avx512: bool = False  # f, bw, dq, vl
    vnni: bool = False  # int8 dot products of 512 bits (vpdpbusd)
    bf16: bool = False  # bfloat16 dot products of 512 bits (vdpbf16ps)
    amx: bool = False  # tiles of bfloat16 (tdpbf16ps), and the system lets this process use them

    @property
    def lanes(self) -> int:
        """float32 numbers in the widest vector."""
        return 16 if self.avx512 else 8

    @property
    def key(self) -> str:
        """A short name, the same for the same features: part of a cached kernel's name."""
        names = [name for name in ("avx2", "avxvnni", "avx512", "vnni", "bf16", "amx") if getattr(self, name)]
        return "-".join(names) or "none"

    @property
    def words(self) -> str:
        """For the user: which instructions do the work."""
        if not self.avx512:
            return "AVX2 with VNNI" if self.avxvnni else "AVX2"
        extra = [name for name, present in (("VNNI", self.vnni), ("BF16", self.bf16), ("AMX", self.amx)) if present]
        return " with ".join(["AVX-512", ", ".join(extra)] if extra else ["AVX-512"])

    def without(self, *names: str) -> Features:
        """These features with some masked, and with them what builds on them."""
        masked = dict.fromkeys(names, False)
        if "avx2" in masked:
            masked |= dict.fromkeys(("avxvnni", "avx512", "vnni", "bf16", "amx"), False)
        if "avx512" in masked:
            masked |= dict.fromkeys(("vnni", "bf16", "amx"), False)
        if "bf16" in masked:
            masked["amx"] = False
        return replace(self, **masked)


NONE = Features()


@cache
def detect() -> Features:
    """The features of this processor that Numba's code generator will accept (NUMBA_CPU_FEATURES may hold some back).

    Needs Numba; a processor that is not an x86-64 has none of them.
    """
    names = _usable()
    if not names >= _AVX2:
        return NONE
    if not names >= _AVX512:
        return Features(avx2=True, avxvnni="avxvnni" in names)
    bf16 = "avx512bf16" in names
    return Features(
        avx2=True,
        avxvnni="avxvnni" in names,
        avx512=True,
        vnni="avx512vnni" in names,
        bf16=bf16,
        amx=bf16 and {"amx-tile", "amx-bf16"} <= names and tiles_granted(),
    )


def _usable() -> set[str]:
    """LLVM's names of the features that both the processor and Numba's target machine have."""
    import llvmlite.binding as llvm
    from numba.core.registry import cpu_target

    host = {name for name, present in llvm.get_host_cpu_features().items() if present}
    codegen = cpu_target.target_context.codegen()
    told = codegen._get_host_cpu_features()  # "+avx2,-sse4a,...": what Numba gives to LLVM
    return host & {name[1:] for name in told.split(",") if name.startswith("+")}
