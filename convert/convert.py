"""A checkpoint folder into one GGUF file: the entry point of ``slimrt convert``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType, Metadata, size_label
from yaml import YAMLError

from slimrt.convert.checkpoint import read_bounded
from slimrt.convert.huggingface import open_huggingface
from slimrt.convert.meta import open_meta
from slimrt.convert.mixes import choose_types, parse_type
from slimrt.convert.source import Source
from slimrt.convert.writer import OutputTensor, Progress, encoded, write_gguf
from slimrt.errors import ModelFileError
from slimrt.output import check_output
from slimrt.paths import user_path

__all__ = ["convert_checkpoint"]

_MAX_CARD_BYTES = 4 << 20


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    type: str = "f16",
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> None:
    """Convert a Hugging Face folder (config.json) or one of Meta's (params.json) to a GGUF file of ``type``.

    Matrices that are quantised in the checkpoint already (gpt-oss's experts) keep their bits and their type.
    ``progress`` is called with (bytes written, bytes in all, tensor name). Memory stays bounded by a few rows of one
    tensor. ``target`` appears complete or not at all; a file that is there already is replaced with ``force`` only, a
    file of the checkpoint never.

    Raises SettingError for an unknown type, ModelFileError or TokenizerError for a checkpoint that cannot be
    converted, OutputError if the target cannot be written or must not be replaced.
    """
    output = parse_type(type)
    source, target = user_path(source), user_path(target)
    check_output(target, sources=_files(source), force=force)
    checkpoint = _open(source)
    tensors = []
    shapes = {name: shape for name, shape in checkpoint.hyperparameters.shapes().items() if name in checkpoint.tensors}
    for name, kind in choose_types(shapes, output, checkpoint.hyperparameters.arch).items():
        tensor, shape = checkpoint.tensors[name], shapes[name]
        if tensor.packed is not None:
            tensors.append(OutputTensor(name, shape, tensor.packed, tensor.rows))
        else:
            tensors.append(OutputTensor(name, shape, kind, encoded(name, tensor.rows, kind, tensor.origin)))
    tensors += [_constant(name, values) for name, values in checkpoint.hyperparameters.constants().items()]
    metadata = _general(checkpoint, tensors)

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
        checkpoint.hyperparameters.write(writer)
        packed = any(tensor.packed for tensor in checkpoint.tensors.values())
        writer.add_file_type(LlamaFileType.MOSTLY_MXFP4_MOE if packed else output.file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        checkpoint.vocabulary.write(writer)

    write_gguf(target, checkpoint.hyperparameters.arch, describe, tensors, progress)


def _files(folder: Path) -> list[Path]:
    """What belongs to the checkpoint: all of its folder but GGUF files, which are results of earlier conversions."""
    return [path for path in folder.iterdir() if path.suffix != ".gguf"] if folder.is_dir() else []


def _open(source: Path) -> Source:
    if not source.is_dir():
        kind = "is a file" if source.exists() else "does not exist"
        raise ModelFileError(f"{source}: {kind}; name a folder with config.json (Hugging Face) or params.json (Meta)")
    # Folders of Mistral and of some LLaMA exports carry both files; config.json says more.
    if (source / "config.json").exists():
        return open_huggingface(source)
    if (source / "params.json").exists():
        return open_meta(source)
    raise ModelFileError(
        f"{source}: neither config.json (Hugging Face) nor params.json (Meta) is there; name the folder that holds one"
    )


def _constant(name: str, values: np.ndarray) -> OutputTensor:
    return OutputTensor(name, values.shape, GGMLQuantizationType.F32, lambda start, stop: values[start:stop])


def _general(checkpoint: Source, tensors: list[OutputTensor]) -> Metadata:
    """The ``general.*`` keys: from the model card where there is one, the folder's name otherwise."""
    n_params = sum(math.prod(tensor.shape) for tensor in tensors)
    folder = checkpoint.folder.resolve()
    for name in ("README.md", "generation_config.json"):  # which gguf reads whole
        if (folder / name).exists():
            read_bounded(folder / name, _MAX_CARD_BYTES)
    try:
        metadata = Metadata.load(None, folder, None, n_params)
        metadata.set_gguf_meta_model(GGUFWriter(None, checkpoint.hyperparameters.arch))  # a rehearsal
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ModelFileError(
            f"{folder}: README.md, config.json or generation_config.json cannot be read as metadata ({reason}); "
            "mend or remove the file"
        ) from None
    if metadata.name is None:
        metadata.name = folder.name
    if metadata.size_label is None:
        metadata.size_label = size_label(n_params, n_params, 0, 0)
    return metadata
