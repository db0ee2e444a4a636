"""LoRA adapters as llama.cpp's convert_lora_to_gguf.py writes them: read, checked against a model, laid beside it.

A file has ``general.type`` "adapter", ``general.architecture`` (the model's), ``adapter.type`` "lora",
``adapter.lora.alpha``, and for each matrix W [out, in] that it changes the tensors W.lora_a [r, in] and
W.lora_b [out, r]. What is added to x W.T is scale * alpha / r * (x A.T) B.T; without an alpha, scale times the product.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.config import ModelConfig
from slimrt.errors import ComputeError, ModelFileError
from slimrt.models.loader import half_split_rows
from slimrt.ops.adapted import Adapted, Delta
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.quants import check_readable, dequantize

__all__ = ["Adapter", "adapted_layers", "adapters_name", "projections", "read_adapter"]

_NAME = re.compile(r"^(?P<base>.+)\.lora_(?P<side>[ab])$")
_LAYER = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.weight$")
_OUTSIDE = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file lies in a layer: which field of ``Layer``, from which output on, its shape; ``heads``:
    of so many first rows the pairs that RoPE turns lie as in the file."""

    field: str
    first: int
    shape: tuple[int, int]
    heads: int = 0


@dataclass(frozen=True)
class Adapter:
    """What a file changes: by layer and field; ``digest`` tells adapters apart, ``nbytes`` is what it takes."""

    path: Path
    digest: str
    deltas: Mapping[tuple[int, str], tuple[Delta, ...]]

    @property
    def nbytes(self) -> int:
        return sum(d.down.nbytes + d.up.nbytes for deltas in self.deltas.values() for d in deltas)


def projections(c: ModelConfig) -> dict[str, tuple[Place, ...]]:
    """The matrices of a layer by their names in files; more than one place where a name has two meanings (``ffn_up``
    alone, or with the gate before it), which shapes tell apart."""
    q, kv, d, f = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_model, c.d_ff
    places: dict[str, tuple[Place, ...]] = {
        "attn_q": (Place("qkv", 0, (q, d), q),),
        "attn_k": (Place("qkv", q, (kv, d), kv),),
        "attn_v": (Place("qkv", q + kv, (kv, d)),),
        "attn_qkv": (Place("qkv", 0, (q + 2 * kv, d), q + kv),),
        "attn_output": (Place("out", 0, (d, q)),),
    }
    if c.experts is None:
        places |= {
            "ffn_gate": (Place("gate_up", 0, (f, d)),),
            "ffn_up": (Place("gate_up", f, (f, d)), Place("gate_up", 0, (2 * f, d))),
            "ffn_down": (Place("down", 0, (d, f)),),
        }
    return places


def read_adapter(path: str | Path, config: ModelConfig, limit: int | None = None) -> Adapter:
    """The adapter in the GGUF file ``path`` for a model of ``config``; ``limit``: bytes that it may take (None: any).

    Raises ModelFileError for a path without a file, what is no LoRA adapter, another architecture's, does not fit the
    model's shapes, lacks a half, changes what slimrt applies no adapter to, or holds NaN; before the weights are read,
    but for the last.
    """
    if not Path(path).exists():
        raise ModelFileError(f"adapter {path}: no such file; name the .gguf file of a LoRA adapter")
    if Path(path).is_dir():
        raise ModelFileError(f"adapter {path}: a folder; 'slimrt convert --lora' makes a .gguf file of a PEFT folder")
    file = GGUFFile(path)
    alpha = _alpha(file, config)
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.match(name)
        if match is None:
            raise ModelFileError(
                f"{file.path}: tensor '{name[:80]}' is no lora_a or lora_b; leaving it out would change the results; "
                "merge the adapter into the model"
            )
        halves.setdefault(match["base"], {})[match["side"]] = tensor
    if not halves:
        raise ModelFileError(f"{file.path}: the adapter has no tensors; fetch it again")
    found = [(*_place(file, base, sides, config), sides) for base, sides in halves.items()]
    size = sum(4 * math.prod(half.shape) for half in file.tensors.values())
    if limit is not None and size > limit:
        raise ModelFileError(
            f"{file.path}: the adapter takes {size / 2**30:.2f} GiB, {limit / 2**30:.2f} GiB are free; use another"
        )
    digest = hashlib.sha256(repr(alpha).encode())
    deltas: dict[tuple[int, str], list[Delta]] = {}
    for layer, place, sides in found:
        a, b = (_values(file, sides[side]) for side in "ab")
        for side in "ab":
            digest.update(f"{sides[side].name}\0{sides[side].shape}".encode())
            digest.update(np.ascontiguousarray(sides[side].data).view(np.uint8).data)
        if config.rope.interleaved and place.heads:
            rows = np.arange(len(b))
            rows[: place.heads] = half_split_rows(config, place.heads)
            b = b[rows]
        factor = alpha / len(a) if alpha else 1.0
        up = np.ascontiguousarray(b) * np.float32(factor)
        deltas.setdefault((layer, place.field), []).append(Delta(place.first, np.ascontiguousarray(a).T, up.T))
    return Adapter(file.path, digest.hexdigest(), {key: tuple(value) for key, value in deltas.items()})


def _alpha(file: GGUFFile, config: ModelConfig) -> float:
    """The file's alpha (0: none), after its metadata were found to be those of an adapter for the model."""
    kind = file.metadata.get("general.type")
    if kind != "adapter":
        raise ModelFileError(
            f"{file.path}: general.type is {str(kind)[:40]!r}, a LoRA adapter's is 'adapter'; name an adapter, and the "
            "model itself as the model"
        )
    form = file.metadata.get("adapter.type")
    if form != "lora":
        raise ModelFileError(f"{file.path}: adapter.type is {str(form)[:40]!r}; slimrt applies 'lora'; use another")
    arch = file.metadata.get("general.architecture")
    if arch != config.arch:
        raise ModelFileError(
            f"{file.path}: an adapter for {str(arch)[:40]}, and the model is a {config.arch}; use the model that "
            "it was made for"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise ModelFileError(
            f"{file.path}: an activated LoRA, which works from certain tokens on; slimrt applies plain LoRA; use "
            "another"
        )
    alpha = file.get("adapter.lora.alpha", float, 0.0)
    if not math.isfinite(alpha):
        raise ModelFileError(f"{file.path}: adapter.lora.alpha is {alpha}; it must be finite; convert it again")
    return alpha


def _place(file: GGUFFile, base: str, sides: dict[str, TensorInfo], c: ModelConfig) -> tuple[int, Place]:
    """Layer and place of the matrix ``base``, its halves checked against each other and the model."""
    where = f"{file.path}: '{base[:80]}'"
    if base in _OUTSIDE:
        raise ModelFileError(
            f"{where}: the adapter changes the embedding or output matrix; slimrt applies adapters to the layers' "
            "projections only; merge it into the model"
        )
    match = _LAYER.match(base)
    part = match[2] if match else ""
    if part.endswith("_exps") or part == "ffn_gate_inp" or (c.experts is not None and part.startswith("ffn_")):
        raise ModelFileError(
            f"{where}: the adapter changes experts; slimrt applies adapters to attention and plain feed-forwards only; "
            "merge it into the model"
        )
    places = projections(c).get(part, ())
    if match is None or not places or int(match[1]) >= c.n_layers:
        raise ModelFileError(
            f"{where} is no projection of a {c.arch} model of {c.n_layers} layers; use the adapter's own model"
        )
    if len(sides) != 2:
        raise ModelFileError(f"{where} has lora_{next(iter(sides))} only; both halves are needed; fetch the file again")
    a, b = sides["a"].shape, sides["b"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
        raise ModelFileError(
            f"{where}: lora_a {a} and lora_b {b}; they must be [rank, in] and [out, rank] of one rank, at least 1; "
            "convert the adapter again"
        )
    fitting = [place for place in places if place.shape == (b[0], a[1])]
    if not fitting:
        raise ModelFileError(
            f"{where}: the adapter is for a matrix [{b[0]}, {a[1]}], the model's is "
            f"{' or '.join(str(list(place.shape)) for place in places)}; use the adapter's own model"
        )
    for half in sides.values():
        check_readable(half)
    return int(match[1]), fitting[0]


def _values(file: GGUFFile, tensor: TensorInfo) -> np.ndarray:
    try:
        return dequantize(tensor)
    except ComputeError:
        raise ModelFileError(
            f"{file.path}: tensor '{tensor.name}' holds NaN or infinite values; fetch the file again"
        ) from None


def adapters_name(adapters: Sequence[tuple[Adapter, float]]) -> str:
    """A name that no other choice of adapters and scales has; empty: none."""
    if not adapters:
        return ""
    return hashlib.sha256(repr([(one.digest, scale) for one, scale in adapters]).encode()).hexdigest()


def adapted_layers(layers: Sequence[Any], adapters: Sequence[tuple[Adapter, float]]) -> list[Any]:
    """``layers`` with each of ``adapters``, times its scale, beside the matrices that it changes."""
    result = list(layers)
    changes: dict[tuple[int, str], list[Delta]] = {}
    for adapter, scale in adapters:
        for key, deltas in adapter.deltas.items():
            changes.setdefault(key, []).extend(
                delta if scale == 1 else dataclasses.replace(delta, up=delta.up * np.float32(scale)) for delta in deltas
            )
    for (number, field), added in changes.items():
        base = getattr(result[number], field)
        result[number] = dataclasses.replace(result[number], **{field: Adapted(base, tuple(added))})
    return result
