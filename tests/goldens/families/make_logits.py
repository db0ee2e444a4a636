"""What Transformers computes with the checkpoints of ``tests/families.py``.

Command (in an environment with torch 2.13.0, transformers 5.24.0, safetensors, numpy), from the repository's root:
``python -m tests.goldens.families.make_logits [case ...]``. It writes, beside itself, ``logits.npz``: for each case
``<case>/<i>``, the logits of the last token of prompt i in float64, and ``<case>/error<i>``, the largest error of the
same in float32.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.families import CASES, prompts, write_checkpoint

HERE = Path(__file__).parent
DOUBLE = torch.float64
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@contextmanager
def float64_everywhere():
    """Transformers' models cast to float32 in norms, RoPE, routers and softmax; a float64 reference must not."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def logits(folder: Path, ids: list[int], *, double: bool) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1].to(DOUBLE).numpy()

    if not double:
        return run()
    model = model.to(DOUBLE)
    with float64_everywhere():
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=model.config)  # whose frequencies were rounded
        return run()


def main(names: list[str]) -> None:
    target = HERE / "logits.npz"
    arrays = dict(np.load(target)) if target.exists() else {}
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(name, Path(folder) / name)
            for i, ids in enumerate(prompts()):
                exact, single = logits(path, ids, double=True), logits(path, ids, double=False)
                arrays[f"{name}/{i}"], arrays[f"{name}/error{i}"] = exact, np.abs(single - exact).max()
                print(name, i, f"largest {np.abs(exact).max():.3f}, float32 errs by {arrays[f'{name}/error{i}']:.2e}")
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
