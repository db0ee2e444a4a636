"""Writes llama_cpp.npz: of each packed type 512 weights in llama.cpp's bytes, and the numbers that it reads from them.

Made with the sources of llama.cpp that come with llama-cpp-python 0.3.36, built with its cmake files, whose library
libggml-base has the functions, from the repository root:

    PYTHONPATH=. python tests/goldens/blocks/make.py BUILD/bin/libggml-base.so
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

COUNT = 512
KINDS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
)  # fmt: skip


def main(library: str) -> None:
    ggml = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL | 1)  # 1: lazy, for symbols of other parts of ggml
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found = {}
    for number, name in enumerate(KINDS):
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        weights = np.random.default_rng(number).normal(0, 0.03, COUNT).astype(np.float32)
        packed, floats = np.zeros(COUNT // elements * size, np.uint8), np.zeros(COUNT, np.float32)
        counts = np.ones(COUNT, np.float32)  # how much each column weighs: some types ask for it
        matrix = counts.ctypes.data if name.startswith("IQ") else None
        written = ggml.ggml_quantize_chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, 1, COUNT, matrix)
        assert written == packed.nbytes
        read = getattr(ggml, f"dequantize_row_{name.lower().replace('_k', '_K')}")
        read.restype, read.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        read(packed.ctypes.data, floats.ctypes.data, COUNT)
        assert np.corrcoef(weights, floats)[0, 1] > 0.5, name
        found |= {f"{name}/bytes": packed, f"{name}/floats": floats}
    np.savez(Path(__file__).with_name("llama_cpp.npz"), **found)


if __name__ == "__main__":
    main(sys.argv[1])
