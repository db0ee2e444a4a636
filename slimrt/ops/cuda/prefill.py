"""Which kernel reads a prompt's attention on which GPU, and how it is launched: decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from slimrt.ops.cuda.device import CudaDevice

__all__ = ["PrefillKernel", "prefill_kernel"]

_HOPPER = (9, 0)  # its instructions exist on no other generation
_WGMMA_WIDTHS = (64, 128)


@dataclass(frozen=True)
class PrefillKernel:
    """A kernel with the contract of ``attention_prefill`` (kernels_cu/README.md); ``words`` for the user.

    ``rows``: queries of a tile; ``keys``: of the tiles of keys, of which ``stages`` are held; ``spare``: bytes of
    shared memory beside tiles.
    """

    source: str
    rows: int
    keys: int
    stages: int
    threads: int
    spare: int
    words: str

    def shared(self, width: int) -> int:
        """Bytes of dynamic shared memory for heads of ``width``."""
        return 2 * width * (self.rows + 2 * self.keys * self.stages) + self.spare

    def macros(self) -> dict[str, int]:
        """What the source is compiled with, beside T and DH."""
        rows = {"TILE": self.rows} if self.source == "attention_prefill" else {}
        return {**rows, "STAGES": self.stages}


def prefill_kernel(device: CudaDevice, width: int = 128, *, wgmma: bool = True) -> PrefillKernel:
    """The kernel for heads of ``width`` on ``device``; ``wgmma``: attention_wgmma where the device has its instructions
    and it takes such heads."""
    if wgmma and device.capability == _HOPPER and width in _WGMMA_WIDTHS:
        return PrefillKernel("attention_wgmma", 128, 128, 2, 384, 1152, "wgmma")
    # As large a tile as leaves room for two blocks on a multiprocessor: Hopper 96 KiB each, A100 64, others 48.
    # Of heads of 256 the 64 rows that the registers have room for take 96 KiB in one stage.
    shared = device.shared_per_block if width <= 128 else 0
    rows, stages = (128, 2) if shared >= 200 << 10 else (128, 1) if shared >= 160 << 10 else (64, 1)
    return PrefillKernel("attention_prefill", rows, 64, stages, 128, 0, "mma.sync")
