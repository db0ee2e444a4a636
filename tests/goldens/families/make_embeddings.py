"""Vectors of texts from Transformers' hidden states, for some checkpoints of ``tests/families.py``.

Command and versions as for ``make_logits.py``: ``python -m tests.goldens.families.make_embeddings``. It writes, beside
itself, ``embeddings.npz``: for each case ``<case>/<pooling>``, [prompts, D] of the states behind the output norm in
float64, not normalised, and ``<case>/error``, the largest error of the same in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from tests.families import prompts, write_checkpoint
from tests.goldens.families.make_logits import DOUBLE, EAGER, HERE, float64_everywhere

EMBEDDED = ("qwen3", "mistral", "gemma3")
POOLINGS = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "cls": lambda x: x[0]}


def states(folder: Path, ids: list[int], *, double: bool) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].to(DOUBLE).numpy()

    if not double:
        return run()
    model = model.to(DOUBLE)
    with float64_everywhere():
        for module in model.modules():
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = type(module.rotary_emb)(config=model.config)  # whose frequencies were rounded
        return run()


def main() -> None:
    arrays = {}
    for name in EMBEDDED:
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(name, Path(folder) / name)
            exact = [states(path, ids, double=True) for ids in prompts()]
            single = [states(path, ids, double=False) for ids in prompts()]
        error = 0.0
        for pooling, pool in POOLINGS.items():
            arrays[f"{name}/{pooling}"] = np.stack([pool(x) for x in exact])
            error = max(error, *(np.abs(pool(a) - pool(b)).max() for a, b in zip(exact, single, strict=True)))
        arrays[f"{name}/error"] = np.array(error)
        print(name, error)
    np.savez_compressed(HERE / "embeddings.npz", **arrays)


if __name__ == "__main__":
    main()
