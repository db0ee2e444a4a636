"""A GGUF file into one of another type: the entry point of ``slimrt quantize``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, quants

from slimrt.convert.checkpoint import Rows
from slimrt.convert.mixes import OutputType, check_takes_importance, choose_types, parse_type
from slimrt.convert.value_types import value_types
from slimrt.convert.writer import OutputTensor, Progress, encoded, write_gguf
from slimrt.errors import ModelFileError, SettingError
from slimrt.models import ARCHITECTURES
from slimrt.output import check_output
from slimrt.paths import user_path
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.kquants import KQUANTS

__all__ = ["quantize_file"]

logger = logging.getLogger(__name__)

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64)


def quantize_file(
    source: str | Path,
    target: str | Path,
    type: str,
    progress: Progress | None = None,
    *,
    force: bool = False,
    importance: Mapping[str, np.ndarray] | None = None,
    about_importance: Mapping[str, str | int] | None = None,
) -> None:
    """Write the GGUF model ``source`` (one file or several parts) to ``target`` with its matrices as ``type``.

    Metadata is kept as it is, but for ``general.file_type``, ``general.quantization_version`` and the ``split.*`` keys
    (the result is one file). Tensors that have their type already are copied bit for bit. Memory stays bounded.

    ``importance``: by tensor name how much each of its columns counts, which K-quants make use of;
    ``about_importance``: what is noted of it in the metadata, under ``quantize.imatrix``.

    A file at ``target`` is replaced with ``force`` only, the source (any part of it) never.

    Raises SettingError for an unknown type, ModelFileError for a source that cannot be read, OutputError if the target
    cannot be written or must not be replaced.
    """
    output = parse_type(type)
    source, target = user_path(source), user_path(target)
    file = GGUFFile(source)
    check_output(target, sources=file.paths, force=force)
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ModelFileError(
            f"{source}: architecture '{arch}'; models that slimrt runs can be quantised: {', '.join(ARCHITECTURES)}"
        )
    kinds = choose_types({name: tensor.shape for name, tensor in file.tensors.items()}, output, arch)
    if importance is not None:
        _check_importance(importance, file, output, kinds)
    counts = importance or {}
    tensors = [
        _output_tensor(tensor, kinds[tensor.name], source, counts.get(tensor.name)) for tensor in file.tensors.values()
    ]
    if any(file.tensors[t.name].type not in (*_FLOATS, t.type) for t in tensors):
        logger.warning(
            "%s: is quantised already; quantising twice costs quality; start from f16 or f32 where you can", source
        )
    types = value_types(source)
    changed = {"general.file_type": int(output.file_type), "general.quantization_version": GGML_QUANT_VERSION}

    dropped = ("split.",) if about_importance is None else ("split.", "quantize.imatrix.")

    def describe(writer: GGUFWriter) -> None:
        for key, value in file.metadata.items():
            if key == "general.alignment":
                writer.add_custom_alignment(value)
            elif key != "general.architecture" and key not in changed and not key.startswith(dropped):
                plain = value.tolist() if isinstance(value, np.ndarray) else value
                writer.add_key_value(key, plain, *types[key])
        for key, value in changed.items():
            writer.add_uint32(key, value)
        for key, noted in (about_importance or {}).items():
            if isinstance(noted, str):
                writer.add_string(f"quantize.imatrix.{key}", noted)
            else:
                writer.add_uint32(f"quantize.imatrix.{key}", noted)

    write_gguf(target, arch, describe, tensors, progress)


def _check_importance(
    importance: Mapping[str, np.ndarray],
    file: GGUFFile,
    output: OutputType,
    kinds: Mapping[str, GGMLQuantizationType],
) -> None:
    """Raises SettingError where no tensor can make use of it, or where it is of another model."""
    check_takes_importance(output)
    used = {name for name, kind in kinds.items() if kind in KQUANTS}
    for name, values in importance.items():
        columns = file.tensor(name).shape[-1]
        if values.shape != (columns,) or not np.isfinite(values).all() or values.min() < 0:
            raise SettingError(
                f"importance of '{name}': it must be {columns} numbers that are not negative; measure it on this model"
            )
    logger.info("%s: importance counts in %d tensors", file.path, len(used & importance.keys()))


def _output_tensor(
    tensor: TensorInfo, kind: GGMLQuantizationType, source: Path, importance: np.ndarray | None
) -> OutputTensor:
    rows = tensor.data.reshape(-1, tensor.data.shape[-1]) if tensor.data.ndim > 1 else tensor.data
    if tensor.type == kind or tensor.name == "rope_freqs.weight":
        return OutputTensor(
            tensor.name, tensor.shape, tensor.type, lambda start, stop: np.ascontiguousarray(rows[start:stop])
        )
    return OutputTensor(
        tensor.name,
        tensor.shape,
        kind,
        encoded(tensor.name, _floats(tensor, rows, source), kind, f"{source}: tensor '{tensor.name}'", importance),
    )


def _floats(tensor: TensorInfo, rows: np.ndarray, source: Path) -> Rows:
    if tensor.type == GGMLQuantizationType.F64:
        return lambda start, stop: rows[start:stop].astype(np.float32)
    if tensor.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return lambda start, stop: np.asarray(rows[start:stop], np.float32)
    try:
        quants.dequantize(np.ascontiguousarray(rows[:1]).view(np.uint8), tensor.type)
    except NotImplementedError:
        raise ModelFileError(
            f"{source}: tensor '{tensor.name}' has type {tensor.type.name}, which cannot be unpacked; quantise "
            "from f16 or f32"
        ) from None

    def dequantized(start: int, stop: int) -> np.ndarray:
        return quants.dequantize(np.ascontiguousarray(rows[start:stop]).view(np.uint8), tensor.type)

    return dequantized
