"""What PEFT computes with the adapters of ``tests/lora_files.py``, and the files that llama.cpp makes of them.

Command (in an environment with torch 2.13.0, transformers 5.24.0, peft 0.21.2, safetensors, numpy), from the
repository's root: ``python -m tests.goldens.lora.make_logits LLAMA_CPP``; LLAMA_CPP: the sources that llama-cpp-python
0.3.36 carries. It writes, beside itself, ``logits.npz``: for each case and set of adapters ``<case>/<set>/<i>``, the
logits of the last token of prompt i in float64, and ``<case>/<set>/error<i>``, the largest error of the same in
float32; and ``<case>.gguf``, adapter "a" by convert_lora_to_gguf.py in float16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from tests.families import prompts, write_checkpoint
from tests.goldens.families.make_logits import DOUBLE, EAGER, float64_everywhere
from tests.lora_files import CASES, SCALES, SETS, write_peft

HERE = Path(__file__).parent


def logits(folder: Path, adapters: dict[str, Path], ids: list[int], *, double: bool) -> np.ndarray:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()
    model = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model.base_model.set_adapter(list(adapters))
    if len(adapters) > 1:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for name in set(adapters) & set(layer.scaling):
                    layer.set_scale(name, SCALES[name])
    model = model.eval()

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].to(DOUBLE).numpy()

    if not double:
        return run()
    model = model.to(DOUBLE)
    with float64_everywhere():
        base.model.rotary_emb = type(base.model.rotary_emb)(config=base.config)  # whose frequencies were rounded
        return run()


def main(sources: str) -> None:
    arrays = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            base = write_checkpoint(case, Path(temporary) / case)
            paths = {which: write_peft(case, which, Path(temporary) / which) for which in SETS}
            for label, chosen in (("a", ["a"]), ("b", ["b"]), ("both", ["a", "b"])):
                adapters = {which: paths[which] for which in chosen}
                for i, ids in enumerate(prompts()):
                    exact, single = (logits(base, adapters, ids, double=double) for double in (True, False))
                    error = np.abs(single - exact).max()
                    arrays[f"{case}/{label}/{i}"], arrays[f"{case}/{label}/error{i}"] = exact, error
                    print(case, label, i, f"largest {np.abs(exact).max():.3f}, float32 errs by {error:.2e}")
            command = [sys.executable, f"{sources}/convert_lora_to_gguf.py", str(paths["a"]), "--base", str(base)]
            target = HERE / f"{case}.gguf"
            subprocess.run([*command, "--outtype", "f16", "--outfile", str(target)], check=True)
    np.savez_compressed(HERE / "logits.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
