"""What a type of packed weights brings to the products of few rows: its spans, and the two words that multiply them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.ops.fast.features import Features

__all__ = ["MAKERS", "Format", "Words", "dot_product"]

Words = tuple[Any, Any]  # unpack and multiply
MAKERS: dict[GGMLQuantizationType, Callable[[Features], Format]] = {}


@dataclass(frozen=True)
class Format:
    """How rows of one type are multiplied: see ``dots``."""

    kind: GGMLQuantizationType
    span: int  # elements
    nbytes: int  # of a span
    offset: float
    quantized: bool  # whether it reads records; else the floats
    unpack: Callable[..., Any]
    multiply: Callable[..., Any]


def dot_product(
    kind: GGMLQuantizationType, span: int, offset: float = 0.0, *, quantized: bool = True
) -> Callable[[Callable[[Features], Words]], Callable[[Features], Words]]:
    """Enter a function that makes the words of ``kind`` for some features; the rest is what ``Format`` says."""
    elements, size = GGML_QUANT_SIZES[kind]

    def register(words: Callable[[Features], Words]) -> Callable[[Features], Words]:
        MAKERS[kind] = lambda features: Format(kind, span, span // elements * size, offset, quantized, *words(features))
        return words

    return register
