"""What a model file holds, as plain data: the command line prints it as JSON or as tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import LlamaFileType

from slimrt.config import CacheConfig, ModelConfig
from slimrt.errors import ModelFileError
from slimrt.memory import cuda as memory_cuda
from slimrt.memory.plan import DEFAULT_CTX, MemoryPlan, plan
from slimrt.models import ARCHITECTURES, read_config
from slimrt.models.unsupported import what_it_is
from slimrt.ops.backend import check_device, describe_backend, find_gpu, uses_kernels
from slimrt.text.tokenizer import check_kind
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.outline import ListedTensor, Outline
from slimrt.weights.quants import check_readable

__all__ = ["describe", "open_for_inspection"]

_NAMED = "tokenizer.chat_template."


def open_for_inspection(path: str | Path) -> GGUFFile | Outline:
    """The file, or what can be told of one that cannot be opened, whose ``problem`` says why.

    Raises ModelFileError where nothing can be told.
    """
    try:
        return GGUFFile(path)
    except ModelFileError as error:
        try:
            outline = Outline(path)
        except ModelFileError:
            raise error from None
        outline.problem = str(error)
        return outline


def describe(
    file: GGUFFile | Outline, ctx: int | None = None, *, device: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """The file's contents: only str, int, float, bool, None, dict and list, so that it goes into JSON as it is.

    ``device``: what would compute. ``ctx``: context of the memory plan (default: the trained one, at most 8192). Keys:
    file, architecture, kind (what else than a language model it is, or None), name, runnable, problem (why not, or
    None), supported (architectures that run), sizes (None if not runnable), rope, context_length, parameters,
    file_type (such as Q4_K_M, None if not stated), bits_per_weight, tensor_types ({type: {tensors, parameters,
    bytes}}, most bytes first), tokenizer, chat_template, chat_templates (further ones, by name), backend (name, why),
    memory (None if not runnable).

    A file that slimrt cannot run is described all the same. Raises SettingError if ``ctx`` is below 1.
    """
    check_device(device)
    config, problem = _check(file)
    tensors = file.listed.values() if isinstance(file, Outline) else file.tensors.values()
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    memory = None
    if config is not None and isinstance(file, GGUFFile):
        memory = _memory(config, file, ctx or min(config.ctx_train, DEFAULT_CTX), device, threads)
    arch = _text(file, "general.architecture")
    return {
        "file": {"path": str(file.path), "bytes": file.file_size, "gguf_version": file.version},
        "architecture": arch,
        "kind": what_it_is(file),
        "name": _text(file, "general.name"),
        "license": _text(file, "general.license"),
        "runnable": config is not None,
        "problem": problem,
        "supported": list(ARCHITECTURES),
        "sizes": config
        and {
            "layers": config.n_layers,
            "width": config.d_model,
            "heads": config.n_heads,
            "kv_heads": config.n_kv_heads,
            "head_width": config.head_dim,
            "feed_forward": config.d_ff,
            "vocabulary": config.vocab_size,
            "tied_output": "output.weight" not in file.tensors,
        },
        "rope": config and {key: _finite(value) for key, value in dataclasses.asdict(config.rope).items()},
        "context_length": config.ctx_train if config else _whole(file, f"{arch}.context_length"),
        "parameters": parameters,
        "file_type": _file_type(file),
        "bits_per_weight": round(8 * nbytes / parameters, 3) if parameters else None,
        "tensor_types": _tensor_types(tensors),
        "tokenizer": _tokenizer(file),
        "chat_template": "tokenizer.chat_template" in file.metadata,
        "chat_templates": sorted(key[len(_NAMED) :] for key in file.metadata if key.startswith(_NAMED)),
        "backend": describe_backend(device, config.head_dim) if config else describe_backend(device),
        "memory": memory,
    }


def _check(file: GGUFFile | Outline) -> tuple[ModelConfig | None, str | None]:
    """The sizes of a model that runs, or why it does not."""
    if isinstance(file, Outline):
        return None, file.problem
    try:
        config = read_config(file)
        for tensor in file.tensors.values():
            check_readable(tensor)
        check_kind(file)
    except ModelFileError as error:
        return None, str(error)
    return config, None


def _tensor_types(tensors: Collection[TensorInfo | ListedTensor]) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += math.prod(tensor.shape)
        entry["bytes"] += tensor.nbytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _file_type(file: GGUFFile | Outline) -> str | None:
    number = _whole(file, "general.file_type")
    known = {int(kind): kind.name for kind in LlamaFileType}
    return None if number is None else known.get(number, str(number)).removeprefix("MOSTLY_").removeprefix("ALL_")


def _tokenizer(file: GGUFFile | Outline) -> dict[str, Any]:
    def length(key: str) -> int | None:
        value = file.metadata.get(key)
        return len(value) if isinstance(value, (list, np.ndarray)) else None

    return {
        "model": _text(file, "tokenizer.ggml.model"),
        "pre": _text(file, "tokenizer.ggml.pre"),
        "tokens": length("tokenizer.ggml.tokens"),
        "merges": length("tokenizer.ggml.merges"),
        "begin": _whole(file, "tokenizer.ggml.bos_token_id"),
        "end": _whole(file, "tokenizer.ggml.eos_token_id"),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity; a setting that is not in force may be either in a damaged file."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _memory(config: ModelConfig, file: GGUFFile, ctx: int, device: str, threads: int | None) -> dict[str, Any]:
    """The plan of what would compute, as plain data."""
    gpu, _ = find_gpu(device)
    planned: MemoryPlan | memory_cuda.CudaPlan
    if gpu is not None:
        planned, _ = memory_cuda.fit(config, file, CacheConfig(ctx), gpu)
        rows = planned.table()
    else:
        planned = plan(config, file, ctx, threads=threads, fast=uses_kernels(device))
        rows = planned.rows()
    return {
        **dataclasses.asdict(planned),
        "total": planned.total,
        "fits": planned.fits(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _text(file: GGUFFile | Outline, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _whole(file: GGUFFile | Outline, key: str) -> int | None:
    value = file.metadata.get(key)
    return value if isinstance(value, int) else None
