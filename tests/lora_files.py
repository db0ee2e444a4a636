"""Random LoRA adapters of the tiny checkpoints in ``tests/families.py``, as PEFT saves them, made from a seed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.families import config, weights

CASES = ("mistral", "qwen3", "phi3")  # rows of Q and K that are moved, norms of heads, stacked matrices
SETS = {"a": {"r": 4, "lora_alpha": 6, "use_rslora": False}, "b": {"r": 3, "lora_alpha": 2, "use_rslora": True}}
SCALES = {"a": 1.0, "b": -0.5}  # of the two applied together
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


def tensors(case: str, which: str) -> dict[str, np.ndarray]:
    """The tensors of adapter ``which`` (one of SETS) of a case, multiples of 1/256; "b" leaves a layer out."""
    rank, found = SETS[which]["r"], dict[str, np.ndarray]()
    for name, matrix in weights(case).items():
        part, number = name.split(".")[-2], name.split(".")[2] if ".layers." in name else ""
        if part not in _PROJECTIONS or (which == "b" and number == "1"):
            continue
        at = f"base_model.model.{name.removesuffix('.weight')}"
        for side, shape in (("A", (rank, matrix.shape[1])), ("B", (matrix.shape[0], rank))):
            rng = np.random.default_rng(zlib.crc32(f"{case} {which} {name} {side}".encode()))
            values = rng.standard_normal(shape) * (1 / np.sqrt(shape[1]) if side == "A" else 0.5)
            found[f"{at}.lora_{side}.weight"] = (np.rint(values * 256) / 256).astype(np.float32)
    return found


def adapter_config(case: str, which: str) -> dict[str, Any]:
    """adapter_config.json."""
    parts = sorted({name.split(".")[-3] for name in tensors(case, which)})
    found: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": parts, "lora_dropout": 0.0,
        "base_model_name_or_path": None, "inference_mode": True, **SETS[which],
    }  # fmt: skip
    if which == "b":
        layers = config(case)["num_hidden_layers"]
        found |= {"layers_to_transform": [n for n in range(layers) if n != 1], "layers_pattern": "layers"}
    return found


def write_peft(case: str, which: str, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The adapter as PEFT's ``save_pretrained`` writes it; ``changes``: of its adapter_config.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(case, which) | (changes or {})))
    save_file(tensors(case, which), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
