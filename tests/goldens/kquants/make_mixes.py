"""Writes mixes.json: which type llama.cpp gives each tensor in its mixes of K-quants.

Made with llama-cpp-python 0.3.36, from the repository root:

    PYTHONPATH=. python tests/goldens/kquants/make_mixes.py
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from tests.goldens.kquants.cases import MIXED, mixed_shapes

TYPES = {"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}


def write(path: Path, case: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    width = case["width"]
    writer.add_block_count(case["layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    if case.get("experts"):
        writer.add_expert_count(case["experts"])
        writer.add_expert_used_count(2)
    tokens = [f"t{n}" for n in range(64)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([1] * 64)
    for name, shape in mixed_shapes(**case).items():
        dtype = np.float32 if len(shape) == 1 or "gate_inp" in name else np.float16
        writer.add_tensor(name, np.ones(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    golden: dict[str, dict[str, dict[str, list[str]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
        for name, case in MIXED.items():
            write(source, case)
            golden[name] = {}
            for kind, number in TYPES.items():
                params = llama_cpp.llama_model_quantize_default_params()
                params.ftype = number
                params.nthread = 2
                status = llama_cpp.llama_model_quantize(
                    str(source).encode(), str(target).encode(), ctypes.byref(params)
                )
                assert status == 0, (name, kind)
                by_type: dict[str, list[str]] = {}
                for tensor in gguf.GGUFReader(target).tensors:
                    by_type.setdefault(tensor.tensor_type.name, []).append(tensor.name)
                by_type.pop("F32")
                # The type of most matrices is left out.
                most = max(by_type, key=lambda kind: len(by_type[kind]))
                golden[name][kind] = {"": [most], **{k: sorted(v) for k, v in by_type.items() if k != most}}
    out = Path(__file__).with_name("mixes.json")
    out.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(out, out.stat().st_size)


if __name__ == "__main__":
    main()
