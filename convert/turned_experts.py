"""Experts as gpt-oss's checkpoints hold them: matrices of all experts in one, turned to [in, out], the rows of gate and
up in turns; in floats, or in MXFP4 as blocks and scales.

MXFP4's numbers keep their bits: a block's scale and its 32 codes of four bits are the same in GGUF, where codes i and
i + 16 share a byte and not 2 i and 2 i + 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from slimrt.convert.checkpoint import StoredTensor
from slimrt.convert.hyperparameters import Hyperparameters
from slimrt.convert.source import SourceTensor
from slimrt.errors import ModelFileError

__all__ = ["take_turned_experts"]

_NAME = re.compile(r"^.*\.layers\.(\d+)\..*experts\.(gate_up|down)_proj(_blocks|_scales|_bias|)$")
_BLOCK = 32  # elements of MXFP4 that share a scale
# Of each stored matrix the parts in GGUF: (first row, step) among the stored ones.
_PARTS = {
    "gate_up": (("ffn_gate_exps", 0, 2), ("ffn_up_exps", 1, 2)),
    "down": (("ffn_down_exps", 0, 1),),
}  # fmt: skip


def take_turned_experts(
    tensors: dict[str, StoredTensor], sizes: Hyperparameters, folder: Path
) -> dict[str, SourceTensor]:
    """The experts' matrices and biases, taken out of ``tensors``: by GGUF name, checked.

    Raises ModelFileError where one is missing or of another shape than the configuration says.
    """
    assert sizes.experts is not None
    found: dict[tuple[int, str], dict[str, StoredTensor]] = {}
    for name in list(tensors):
        match = _NAME.match(name)
        if match and int(match[1]) < sizes.n_layers:
            found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensors.pop(name)
    count, width = sizes.experts
    rows = {"gate_up": (2 * width, sizes.d_model), "down": (sizes.d_model, width)}
    last = _LastMatrix()
    result: dict[str, SourceTensor] = {}
    for layer in range(sizes.n_layers):
        for part, (out, inner) in rows.items():
            stored = found.get((layer, part), {})
            packed = "" not in stored
            shapes: dict[str, tuple[int, ...]] = {"_bias": (count, out)}
            if packed:
                shapes |= {
                    "_blocks": (count, out, inner // _BLOCK, _BLOCK // 2),
                    "_scales": (count, out, inner // _BLOCK),
                }
            else:
                shapes[""] = (count, inner, out)
            for kind, shape in shapes.items():
                _check(stored.get(kind), f"layers.{layer}.mlp.experts.{part}_proj{kind}", shape, folder)
            for name, first, step in _PARTS[part]:
                at = f"blk.{layer}.{name}"
                if packed:
                    result[f"{at}.weight"] = _packed(stored["_blocks"], stored["_scales"], first, step)
                else:
                    result[f"{at}.weight"] = _floats(stored[""], first, step, last)
                result[f"{at}.bias"] = _bias(stored["_bias"], first, step)
    return result


def _check(tensor: StoredTensor | None, name: str, shape: tuple[int, ...], folder: Path) -> None:
    if tensor is None:
        raise ModelFileError(f"{folder}: {name} is missing; a shard is incomplete; fetch the whole folder")
    if tensor.shape != shape:
        raise ModelFileError(
            f"{folder}: {name} has shape {tensor.shape}; the configuration says {shape}; weights and configuration "
            "differ; fetch both again"
        )
    if (tensor.kind == "U8") != name.endswith(("_blocks", "_scales")):
        raise ModelFileError(
            f"{folder}: {name} has type {tensor.kind}; blocks and scales are bytes, all else is floats"
        )


class _LastMatrix:
    """The matrix of one expert [out, in], the last that was asked for: rows are written expert by expert."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._matrix = np.empty((0, 0), np.float32)

    def of(self, stored: StoredTensor, expert: int) -> np.ndarray:
        if self._key != (stored.name, expert):
            self._matrix = stored.rows(expert, expert + 1)[0].T
            self._key = stored.name, expert
        return self._matrix


def _floats(stored: StoredTensor, first: int, step: int, last: _LastMatrix) -> SourceTensor:
    """Rows of all experts, one after the other."""
    each = stored.shape[2] // step  # rows of an expert

    def rows(start: int, stop: int) -> np.ndarray:
        pieces = []
        while start < stop:
            expert, low = divmod(start, each)
            high = min(each, low + stop - start)
            pieces.append(last.of(stored, expert)[first + step * low : first + step * high : step])
            start += high - low
        return np.concatenate(pieces)

    return SourceTensor(rows, _origin(stored))


def _bias(stored: StoredTensor, first: int, step: int) -> SourceTensor:
    return SourceTensor(lambda start, stop: stored.rows(start, stop)[:, first::step], _origin(stored))


def _packed(blocks: StoredTensor, scales: StoredTensor, first: int, step: int) -> SourceTensor:
    """Rows of MXFP4 as GGUF packs them: of each block the scale, then 16 bytes."""

    def read(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        inner = tensor.shape[2:]
        flat = dataclasses.replace(
            tensor, shape=(tensor.shape[0] * tensor.shape[1], *inner), row_stride=math.prod(inner)
        )
        return flat.stored_rows(start * step, stop * step)[first::step]

    def rows(start: int, stop: int) -> np.ndarray:
        codes, exponents = read(blocks, start, stop), read(scales, start, stop)
        if (exponents == 255).any():
            raise ModelFileError(
                f"{_origin(scales)}: holds the scale 255, which is NaN; a model needs finite weights; the file is "
                "corrupt; fetch it again"
            )
        elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], _BLOCK)
        bytes_ = elements[..., : _BLOCK // 2] | elements[..., _BLOCK // 2 :] << 4
        return np.concatenate([exponents[..., None], bytes_], axis=-1).reshape(stop - start, -1)

    return SourceTensor(rows, _origin(blocks), GGMLQuantizationType.MXFP4)


def _origin(stored: StoredTensor) -> str:
    return f"{stored.path}: tensor '{stored.name}'"
