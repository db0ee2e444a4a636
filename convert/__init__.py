"""Checkpoints into GGUF files, and GGUF files into smaller ones, without a deep-learning framework.

``checkpoint`` reads stored tensors row by row (``safetensors_reader``, ``pth_reader`` find them), ``huggingface`` and
``meta`` turn a folder into hyperparameters, named tensors and a vocabulary (``vocabulary``, ``pretokenizer``,
``special_tokens``), ``writer`` streams a GGUF file, ``convert`` and ``quantize`` are the two entry points.
"""

from __future__ import annotations

from slimrt.convert.convert import convert_checkpoint
from slimrt.convert.mixes import OUTPUT_TYPES
from slimrt.convert.peft import convert_adapter
from slimrt.convert.quantize import quantize_file

__all__ = ["OUTPUT_TYPES", "convert_adapter", "convert_checkpoint", "quantize_file"]
