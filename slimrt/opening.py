"""From a file and the options of load to what will compute it, before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimrt.config import CacheConfig, ModelConfig
from slimrt.drafting.model import DraftModel, check_vocabulary
from slimrt.engine import Engine
from slimrt.errors import SettingError, SlimrtError
from slimrt.hub.store import resolve
from slimrt.load_options import LoadOptions
from slimrt.memory import cuda as memory_cuda
from slimrt.memory.cuda import CudaPlan
from slimrt.memory.plan import DEFAULT_CTX, MemoryPlan, largest_context
from slimrt.memory.plan import plan as plan_memory
from slimrt.models import build, read_config, stretch_rope
from slimrt.ops.backend import Backend, check_device, find_gpu, open_backend, open_cuda, uses_kernels
from slimrt.ops.cuda.device import wants_gpu
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile

__all__ = ["Opened", "context_of", "open_draft"]


def context_of(options: LoadOptions, config: ModelConfig) -> int:
    """The most tokens of a conversation: the trained context, at most 8192, where nothing is said."""
    return min(config.ctx_train, DEFAULT_CTX) if options.ctx is None else options.ctx


class Opened:
    """Of a file under these options: ``config`` (its sizes, RoPE stretched for the context), ``ctx``, ``cache``,
    ``backend``, ``memory`` (its plan) and ``notes`` (what was decided and is worth saying).

    Raises SettingError for what does not fit or cannot be, DeviceError where the GPU asked for cannot be used.
    """

    def __init__(self, file: GGUFFile, options: LoadOptions) -> None:
        config = read_config(file)
        self.ctx = context_of(options, config)
        self.cache = CacheConfig(self.ctx, options.kv_budget)
        check_device(options.device)
        self.notes: list[str] = []
        self.config: ModelConfig = stretch_rope(
            config, self.ctx, base=options.rope_base, scaling=options.rope_scaling, factor=options.rope_factor
        )
        if self.config.rope.scaling == "yarn" and config.rope.scaling == "none" and options.rope_scaling is None:
            self.notes.append(
                f"context {self.ctx} exceeds the {config.ctx_train} that the model was trained on: RoPE is stretched "
                f"{self.config.rope.factor:.3g}x by YaRN (rope_scaling='none', --rope-scaling none: not at all)"
            )
        self.memory: MemoryPlan | CudaPlan
        self.backend = self._gpu(file, options) or self._cpu(file, options)

    def _cpu(self, file: GGUFFile, options: LoadOptions) -> Backend:
        """The CPU, with ``memory`` its plan."""
        if options.stream_weights:
            raise SettingError(
                "stream_weights: weights are streamed to a GPU, this runs on the CPU; leave it out or use device='cuda'"
            )
        device = "numpy" if options.device == "numpy" else "cpu"
        fast = uses_kernels(device)
        how: dict[str, Any] = {"threads": options.threads, "fast": fast, "kv_budget": options.kv_budget}
        self.memory = memory = plan_memory(self.config, file, self.ctx, **how)
        if not memory.fits():
            raise SettingError(_does_not_fit(memory, largest_context(self.config, file, self.ctx, **how)))
        if self.cache.offloads:
            whole = plan_memory(self.config, file, self.ctx, threads=options.threads, fast=fast).total
            if memory.total >= whole:
                self.notes.append(
                    "a KV budget saves no memory on a CPU, where rows behind it lie in the same memory: "
                    f"{memory.total / 2**30:.1f} GiB with it, {whole / 2**30:.1f} without; decode reads fewer rows"
                )
        if memory.packed and not fast:
            self.notes.append(
                "weights stay packed: unpacked they would take more than half of the free memory; expect slow decoding"
            )
        backend = open_backend(device, threads=options.threads, packed=memory.packed)
        if device == "cpu" and not fast:
            self.notes.append(f"computing with {backend.why}")
        return backend

    def _gpu(self, file: GGUFFile, options: LoadOptions) -> Backend | None:
        """The GPU, opened, with ``memory`` its plan; None for the CPU, and a note if a GPU is there but not used.

        Raises DeviceError or SettingError where the GPU was asked for by name and cannot be used.
        """
        gpu, why = find_gpu(options.device)
        if gpu is not None:
            self.memory, problem = memory_cuda.fit(self.config, file, self.cache, gpu, stream=options.stream_weights)
            try:
                if problem is None:
                    return open_cuda(gpu, keeps_unpacked=self.memory.keeps, element=self.memory.element)
                raise SettingError(problem)
            except SlimrtError as error:
                if options.device == "cuda":
                    raise
                why = str(error)
        if options.device == "auto" and wants_gpu():
            self.notes.append(f"computing on the CPU: {why}")
        return None


def open_draft(
    model: str | Path, tokenizer: Tokenizer, ctx: int, backend: Backend, threads: int | None
) -> DraftModel:  # fmt: skip
    """A smaller model that guesses for one with this ``tokenizer`` and context, on the same backend.

    Raises SettingError for another vocabulary, or where there is no room beside the first; as ``resolve`` does.
    """
    file = GGUFFile(resolve(model))
    config = read_config(file)
    check_vocabulary(tokenizer, Tokenizer.from_gguf(file), config.name)
    ctx, ops = min(ctx, config.ctx_train), backend.ops
    if ops.name != "cuda":
        memory = plan_memory(config, file, ctx, threads=threads, fast=ops.name == "fast")
        if not memory.fits():
            raise SettingError(f"draft model {config.name}: {_does_not_fit(memory, 0)}")
    return DraftModel(Engine(build(config, file, ops), ops), ctx, config.name)


def _does_not_fit(plan: MemoryPlan, room: int) -> str:
    """The refusal of a memory plan; ``room`` is the largest context that would fit."""
    assert plan.available is not None
    remedy = f"a context of {room} fits (ctx={room}, --ctx {room})" if room else "use a smaller model or quantisation"
    return (
        f"the model needs {plan.total / 2**30:.1f} GiB at a context of {plan.ctx} (weights {plan.weights / 2**30:.1f}, "
        f"KV cache {(plan.kv + plan.kv_host) / 2**30:.1f}, hidden states {plan.boundary / 2**30:.1f}, "
        f"scratch {plan.scratch / 2**30:.1f}, interpreter and libraries {plan.runtime / 2**30:.1f}), "
        f"{plan.available / 2**30:.1f} GiB are free; {remedy}"
    )
