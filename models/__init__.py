"""The models that run: ``families/`` says what each is made of, ``reading`` reads sizes, ``llama`` computes."""

from __future__ import annotations

from collections.abc import Callable

from slimrt.config import ModelConfig
from slimrt.models.families import ARCHITECTURES
from slimrt.models.llama import Llama
from slimrt.models.reading import read_config, stretch_rope
from slimrt.ops.protocol import Ops
from slimrt.weights.gguf import GGUFFile

__all__ = ["ARCHITECTURES", "Llama", "build", "read_config", "stretch_rope"]


def build(
    config: ModelConfig,
    file: GGUFFile,
    ops: Ops,
    progress: Callable[[int, int], None] | None = None,
    *,
    stream: bool = False,
) -> Llama:
    """The model's weights on ``ops``; ``stream``: those of the layers in host memory, for a device that is too small.

    Raises ModelFileError for missing or misshapen tensors.
    """
    return Llama(config, file, ops, progress, stream=stream)
