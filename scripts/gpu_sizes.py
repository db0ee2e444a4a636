"""What the GPU steps check and measure, and on what: full size on a card, tiny in the emulation."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DRY", "FULL", "QUICK", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """``shape``: of ``slimrt.bench.synthetic``; lengths, budgets and rows in tokens.

    Checks: ``attention`` (head width, keys, query rows), ``windowed`` (head width, keys, window, cap), ``weights``
    (types of single matrices), ``types`` of ``shape`` against NumPy over ``check_layers`` layers and ``check_tokens``
    tokens, ``long`` tokens where bits are compared. Measurements: prompts of ``lengths`` (``packed_lengths`` in
    ``packed_type``) under ``plans``, attention over ``kernel_tokens``, decode behind ``contexts`` for
    ``decode_tokens``, a KV ``budget``.
    """

    shape: str
    attention: tuple[tuple[int, int, int], ...]
    windowed: tuple[tuple[int, int, int, float], ...]
    sampled_rows: int
    weights: tuple[str, ...]
    types: tuple[str, ...]
    check_layers: int
    check_tokens: int
    long: int
    prompts: int
    repeats: int
    measured_types: tuple[str, str]
    lengths: tuple[int, ...]
    packed_type: str
    packed_lengths: tuple[int, ...]
    peer_lengths: tuple[int, ...]
    plans: tuple[str, ...]
    kernel_tokens: int
    peer_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_tokens: int
    budget: int
    ring_length: int
    copy_bytes: int

    def times(self, length: int) -> int:
        """How often a prompt of ``length`` is measured: the longest take many seconds."""
        return self.repeats if length <= 32768 else min(self.repeats, 2) if length <= 65536 else 1


FULL = Sizes(
    shape="llama-3.1-8b",
    attention=((128, 16384, 16384), (128, 65536, 65536), (128, 131072, 131072), (128, 65536, 5000), (64, 65536, 65536)),
    windowed=((128, 16384, 4096, 0.0), (128, 16384, 4096, 50.0), (256, 16384, 4096, 50.0), (96, 16384, 2047, 0.0)),
    sampled_rows=10,
    weights=("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
    types=("F16", "BF16", "Q4_0", "Q8_0", "Q4_K"),
    check_layers=2,
    check_tokens=256,
    long=32768,
    prompts=16,
    repeats=3,
    measured_types=("F16", "Q4_0"),
    lengths=(8192, 32768, 65536),
    packed_type="Q4_K",
    packed_lengths=(32768, 65536),
    peer_lengths=(8192, 32768, 65536),
    plans=("off", "8k/4k/2k", "1/2,1/4"),
    kernel_tokens=32768,
    peer_tokens=(16384, 32768, 65536),
    contexts=(4096, 65536),
    decode_tokens=64,
    budget=4096,
    ring_length=32768,
    copy_bytes=1 << 30,
)
QUICK = replace(
    FULL,
    repeats=2,
    lengths=(32768,),
    packed_lengths=(32768,),
    peer_lengths=(32768,),
    plans=("off", "8k/4k/2k"),
    peer_tokens=(32768,),
    contexts=(4096,),
)
DRY = Sizes(
    shape="tiny",
    attention=((64, 300, 300), (128, 200, 70)),
    windowed=((64, 300, 90, 5.0),),
    sampled_rows=4,
    weights=("F16", "Q4_0"),
    types=("Q4_0",),
    check_layers=3,
    check_tokens=48,
    long=112,
    prompts=3,
    repeats=1,
    measured_types=("Q4_0", "Q4_0"),
    lengths=(96, 160),
    packed_type="Q4_0",
    packed_lengths=(96,),
    peer_lengths=(96,),
    plans=("off", "tiny"),
    kernel_tokens=96,
    peer_tokens=(96,),
    contexts=(96, 160),
    decode_tokens=2,
    budget=128,
    ring_length=176,
    copy_bytes=1 << 16,
)
