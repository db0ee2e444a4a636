"""The language model of a checkpoint that reads images as well: its part of config.json and of the tensors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from slimrt.convert.checkpoint import StoredTensor

__all__ = ["text_config", "text_tensors"]

logger = logging.getLogger(__name__)

# What stands before the names of a language model's tensors in such checkpoints, older and newer ones.
_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
_OTHERS = (
    "vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.", "vision_model.",
    "vision_encoder.", "vision_language_adapter.", "patch_merger.",
)  # fmt: skip


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as if the language model stood alone; itself where it does."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    return {**inner, "architectures": config.get("architectures"), "quantization_config": _packed(config, inner)}


def _packed(config: dict[str, Any], inner: dict[str, Any]) -> Any:
    return config.get("quantization_config") or inner.get("quantization_config")


def text_tensors(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the language model under the names that they have where it stands alone. What is left out is
    logged in a line."""
    kept: dict[str, StoredTensor] = {}
    left_out = 0
    for name, tensor in tensors.items():
        if name.startswith(_OTHERS):
            left_out += 1
            continue
        for prefix, instead in _PREFIXES:
            if name.startswith(prefix):
                name = instead + name.removeprefix(prefix)
                break
        kept[name] = tensor
    if left_out:
        logger.warning(
            "%s: the file gets the language model; %d tensors of the part that sees images are left out",
            folder,
            left_out,
        )
    return kept
