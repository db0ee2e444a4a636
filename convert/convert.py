"""A checkpoint folder into one GGUF file: the entry point of ``slimrt convert``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType, Metadata, size_label
from yaml import YAMLError

from slimrt.convert.huggingface import open_huggingface
from slimrt.convert.meta import open_meta
from slimrt.convert.source import Source
from slimrt.convert.writer import OutputTensor, Progress, check_target, choose_type, encoded, parse_type, write_gguf
from slimrt.errors import ModelFileError

__all__ = ["convert_checkpoint"]


def convert_checkpoint(source: Path, target: Path, type: str = "f16", progress: Progress | None = None) -> None:
    """Convert a Hugging Face folder (config.json) or one of Meta's (params.json) to a GGUF file of ``type``.

    ``progress`` is called with (bytes written, bytes in all, tensor name). Memory stays bounded by a few rows of one
    tensor. ``target`` appears complete or not at all and replaces what was there.

    Raises SettingError for an unknown type, ModelFileError or TokenizerError for a checkpoint that cannot be
    converted, FetchError if the target cannot be written.
    """
    wanted, file_type = parse_type(type)
    check_target(target, [])
    checkpoint = _open(source)
    tensors = []
    for name, shape in checkpoint.hyperparameters.shapes().items():
        if name in checkpoint.tensors:
            tensor, kind = checkpoint.tensors[name], choose_type(name, shape, wanted)
            tensors.append(OutputTensor(name, shape, kind, encoded(name, tensor.rows, kind, tensor.origin)))
    divisors = checkpoint.hyperparameters.rope_divisors()
    if divisors is not None:
        tensors.append(_constant("rope_freqs.weight", divisors))
    metadata = _general(checkpoint, tensors)

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
        checkpoint.hyperparameters.write(writer)
        writer.add_file_type(LlamaFileType(file_type))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        checkpoint.vocabulary.write(writer)

    write_gguf(target, checkpoint.hyperparameters.arch, describe, tensors, progress)


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
    try:
        metadata = Metadata.load(None, folder, None, n_params)
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelFileError(
            f"{folder}: README.md, config.json or generation_config.json cannot be read as metadata "
            f"({str(error).splitlines()[0][:80]}); "
            "mend or remove the file"
        ) from None
    if metadata.name is None:
        metadata.name = folder.name
    if metadata.size_label is None:
        metadata.size_label = size_label(n_params, n_params, 0, 0)
    return metadata
