"""EXAONE 3 and InternLM 2 compute what LLaMA does, under other names: the same weights give the same logits.

Transformers has no classes of theirs (their code comes with the checkpoints), so there are no goldens of its making.
Names and layouts are those of modeling_exaone.py and modeling_internlm2.py beside the published weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from slimrt.config import CacheConfig
from slimrt.convert import convert_checkpoint
from slimrt.engine import Engine
from slimrt.models import build, read_config
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests import reference
from tests.families import DH, KV, H, config, prompts, weights, write_checkpoint

EXAONE = {
    "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention", "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def renamed(tensors: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    result = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        result[name] = tensor
    return result


def grouped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Q, K and V as InternLM 2 has them: of each KV head its query heads, its key, its value."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith("q_proj.weight"):
            parts = {part: result.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"}
            q, k, v = (parts[part].reshape(KV, -1, DH, parts[part].shape[1]) for part in "qkv")
            joint = np.concatenate([q, k, v], axis=1)
            assert joint.shape[1] == H // KV + 2
            wqkv = name.replace("self_attn.q_proj", "attention.wqkv")
            result[wqkv] = np.ascontiguousarray(joint.reshape(-1, joint.shape[-1]))
    return result


def logits(path: Path) -> np.ndarray:
    file, ops = GGUFFile(path), NumpyOps(1)
    session = Session(Engine(build(read_config(file), file, ops), ops, CacheConfig(128)), 128)
    session.prefill(prompts()[0])
    assert session.logits is not None
    return session.logits


@pytest.mark.parametrize("name", ["ExaoneForCausalLM", "InternLM2ForCausalLM"])
def test_other_names(name: str, tmp_path: Path) -> None:
    plain = {"sliding_window": None, "head_dim": DH}
    llama = write_checkpoint("mistral", tmp_path / "llama", **plain)
    convert_checkpoint(llama, tmp_path / "llama.gguf", "f32")
    other = write_checkpoint("mistral", tmp_path / "other", **plain)
    settings, tensors = config("mistral", **plain, architectures=[name]), weights("mistral", **plain)
    if name == "ExaoneForCausalLM":
        tensors = renamed(tensors, EXAONE)
        for ours, theirs in (("num_hidden_layers", "num_layers"), ("rms_norm_eps", "layer_norm_epsilon"),
                             ("hidden_act", "activation_function")):  # fmt: skip
            settings[theirs] = settings.pop(ours)
    else:
        tensors = renamed(grouped(tensors), INTERNLM2)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(other, tmp_path / "other.gguf", "f32")
    # The half-split layout sums a product's terms in another order; both err as float32 does.
    file = GGUFFile(tmp_path / "llama.gguf")
    truth = reference.logits(file, read_config(file), prompts()[0], np.float64)[-1]
    found, plain = logits(tmp_path / "other.gguf"), logits(tmp_path / "llama.gguf")
    assert np.abs(found - truth).max() <= 4 * np.abs(plain - truth).max()
