"""Writes llama_cpp.json: the errors that llama.cpp's own quantisers of K-quants make on the weights of ``cases.py``.

Made with the sources of llama.cpp that come with llama-cpp-python 0.3.36 (gguf 0.19 to unpack), from the repository
root. GGML is llama.cpp's folder ggml, BUILD any folder with an empty ggml-version.h that defines GGML_VERSION and
GGML_COMMIT; the library libggml-base of an installed llama-cpp-python does as well:

    gcc -O3 -mavx2 -mfma -mf16c -shared -fPIC -I BUILD -I GGML/include -I GGML/src \
        GGML/src/ggml-quants.c GGML/src/ggml.c -o BUILD/libggml-base.so
    PYTHONPATH=. python tests/goldens/kquants/make.py BUILD/libggml-base.so SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tests.goldens.kquants.cases import KINDS, errors, importance, of_the_model, random_cases


def quantised(library: ctypes.CDLL, x: np.ndarray, kind: GGMLQuantizationType, counts: np.ndarray | None) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[kind]
    out = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    function = getattr(library, f"quantize_{kind.name.lower().replace('_k', '_K')}")
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    x = np.ascontiguousarray(x, np.float32)
    weights = None if counts is None else counts.ctypes.data
    assert function(x.ctypes.data, out.ctypes.data, *x.shape, weights) == out.nbytes
    return gguf.dequantize(out, kind)


def main(library: str, model: Path) -> None:
    loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL | 1)  # 1: lazy, for symbols of other parts of ggml
    golden: dict[str, dict[str, list[float]]] = {}
    for name, x in (*random_cases().items(), *of_the_model(model).items()):
        golden[name] = {}
        for kind in KINDS:
            golden[name][kind.name] = errors(x, quantised(loaded, x, kind, None), kind)
            counts = importance(x.shape[1])
            golden[name][f"{kind.name} importance"] = errors(x, quantised(loaded, x, kind, counts), kind, counts)
    out = Path(__file__).with_name("llama_cpp.json")
    out.write_text(json.dumps(golden, indent=1) + "\n")
    print(out, out.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
