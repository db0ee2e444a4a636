"""What every kind of checkpoint folder is turned into before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

from slimrt.convert.checkpoint import Rows
from slimrt.convert.hyperparameters import Hyperparameters
from slimrt.convert.vocabulary import Vocabulary
from slimrt.errors import ModelFileError

__all__ = ["Source", "SourceTensor", "check_complete", "check_layers", "gguf_names"]

_ARCHS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
# Buffers that older exports carry; both are recomputed from the metadata.
_COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")


@dataclass(frozen=True)
class SourceTensor:
    """Rows in GGUF's layout; ``origin`` names file and tensor in errors. ``packed``: the type that they are packed as
    already, else they are float32."""

    rows: Rows
    origin: str
    packed: GGMLQuantizationType | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint, checked: every tensor that the architecture needs is there, in the right shape."""

    folder: Path
    hyperparameters: Hyperparameters
    tensors: Mapping[str, SourceTensor]  # by GGUF name
    vocabulary: Vocabulary


def check_layers(n_layers: int, n_tensors: int, path: Path, per_layer: int = 9) -> None:
    """Raises ModelFileError if so many layers cannot be in a checkpoint of ``n_tensors``; nothing is sized by the
    number before.
    """
    if n_layers * per_layer > n_tensors:
        raise ModelFileError(
            f"{path}: {n_layers} layers need at least {n_layers * per_layer} tensors and the checkpoint has "
            f"{n_tensors}; shards are missing or the file belongs to another model; fetch the whole folder"
        )


def gguf_names(names: Sequence[str], arch: str, n_layers: int, folder: Path) -> dict[str, str]:
    """GGUF name -> checkpoint name. Raises ModelFileError for names outside the architecture, or two for one."""
    name_map = get_tensor_name_map(_ARCHS[arch], n_layers)
    mapped: dict[str, str] = {}
    for name in names:
        if name.endswith(_COMPUTED):
            continue
        gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelFileError(
                f"{folder}: tensor '{name[:80]}' does not belong to a {arch} model of {n_layers} layers; "
                "leaving it out would change the results; only plain LLaMA-like checkpoints can be converted"
            )
        if not gguf_name.endswith((".weight", ".bias")):  # a parameter of a layer itself: gpt-oss's sinks
            gguf_name += ".weight"
        if gguf_name in mapped:
            raise ModelFileError(
                f"{folder}: tensors '{name[:80]}' and '{mapped[gguf_name][:80]}' are both {gguf_name}; keep one"
            )
        mapped[gguf_name] = name
    return mapped


def check_complete(shapes: Mapping[str, tuple[int, ...]], sizes: Hyperparameters, folder: Path) -> None:
    """Raises ModelFileError unless ``shapes`` (by GGUF name) are exactly those that ``sizes`` state."""
    expected = sizes.shapes()
    for name, shape in shapes.items():
        if name not in expected:
            raise ModelFileError(
                f"{folder}: tensor {name} has no place in a {sizes.arch} model; only plain LLaMA-like checkpoints "
                "can be converted"
            )
        if shape != expected[name]:
            raise ModelFileError(
                f"{folder}: {name} has shape {shape}; the configuration says {expected[name]}; weights and "
                "configuration differ; fetch both again"
            )
    missing = [name for name in expected if name not in shapes and sizes.required(name)]
    if missing:
        raise ModelFileError(
            f"{folder}: {len(missing)} tensors are missing (first: {missing[0]}); a shard is incomplete; fetch the "
            "whole folder"
        )
