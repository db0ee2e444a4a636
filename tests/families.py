"""Tiny random checkpoints of every family, made from a seed: the same bits wherever NumPy draws them.

A case is a config.json in the names of Transformers and the tensors that its class has; ``tests/goldens/families`` has
what Transformers computes with them. Sizes are such that windows, patterns and factors take effect in a few layers.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
V, D, H, KV, DH, F, L = 384, 64, 4, 2, 16, 96, 3
_COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": KV, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
_PHI3 = {
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 256, "sliding_window": 24,
    "partial_rotary_factor": 0.75, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "partial_rotary_factor": 0.75},
}  # fmt: skip
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.5], "long_factor": [1.0, 1.5, 2, 3, 5, 8, 13, 21]}


def _rope(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}


_GPT_OSS: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": DH, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32,
    "attention_bias": True, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                        "truncate": False, "original_max_position_embeddings": 32},
}  # fmt: skip
_WINDOWED = ["sliding_attention", "full_attention"] * 2
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": DH,
              "layer_types": ["full_attention"] * L, "sliding_window": None, "use_sliding_window": False, **_rope(1e6)},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": DH, "sliding_window": 20,
                **_rope(1e4)},
    "smollm3": {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4,
                "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 4,
                "sliding_window": None, "use_sliding_window": False, **_rope(2e6)},
    "granite": {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.1,
                "embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, **_rope(1e4)},
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_PHI3, "num_attention_heads": 4,
             "hidden_size": 64, "partial_rotary_factor": 0.75},
    "phi3-long": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_PHI3, "sliding_window": None,
                  "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0,
                  "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                                      "original_max_position_embeddings": 32, "factor": 8.0, **_FACTORS}},
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **_rope(5e5)},
    "olmo3": {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": 20,
              "num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], **_rope(5e5)},
    "gemma": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 32, "tie_word_embeddings": True,
              "hidden_act": "gelu_pytorch_tanh", **_rope(1e4)},
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": DH, "sliding_window": 20,
               "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 4,
               "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
               "layer_types": _WINDOWED, "tie_word_embeddings": True, **_rope(1e4)},
    "gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": DH,
               "sliding_window": 20, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
               "num_hidden_layers": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None,
               "final_logit_softcapping": None, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
               "tie_word_embeddings": True,
               "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "command-r": {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "layer_norm_eps": 1e-5,
                  "logit_scale": 0.25, "use_qk_norm": False, "tie_word_embeddings": True, **_rope(1e4)},
    "cohere2": {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "layer_norm_eps": 1e-5,
                "logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 20, "num_hidden_layers": 4,
                "rotary_pct": 1.0,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "head_dim": DH, **_rope(5e4)},
    "qwen3moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": DH,
                 "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
                 "decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False,
                 **_rope(1e6)},
    "qwen3moe-plain": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": DH,
                       "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                       "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                       "sliding_window": None, "use_sliding_window": False, **_rope(1e6)},
    "qwen3-windows": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": DH,
                      "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 20,
                      "use_sliding_window": True, "max_window_layers": 0, **_rope(1e6)},
    "ministral": {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "head_dim": DH,
                  "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 20,
                  **_rope(1e4)},
    "ministral3": {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], "head_dim": DH,
                   "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
                                       "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                                       "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}},
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
                "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": None, "head_dim": DH,
                **_rope(1e6)},
    "gpt-oss": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **_GPT_OSS},
    "gpt-oss-mxfp4": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **_GPT_OSS,
                      "rope_parameters": {**_GPT_OSS["rope_parameters"], "truncate": True},
                      "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
                          "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}},
}  # fmt: skip


def config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a case."""
    return {**_COMMON, **CASES[name], **changes}


def _shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a case's checkpoint."""
    d, f, width = c["hidden_size"], c["intermediate_size"], c.get("head_dim", DH)
    q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
    kind = c["model_type"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, d)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind.startswith("olmo"):
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
    elif kind.startswith("cohere"):
        norms = ["input_layernorm"]
    elif kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}.weight": (d,) for norm in norms}
        if kind == "phi3":
            shapes[f"{at}.self_attn.qkv_proj.weight"] = (q + 2 * kv, d)
            shapes[f"{at}.mlp.gate_up_proj.weight"] = (2 * f, d)
        else:
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{at}.self_attn.{part}_proj.weight"] = (rows, d)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, q)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            shapes |= {f"{at}.self_attn.{part}_norm.weight": (width,) for part in "qk"}
        elif kind.startswith("olmo"):
            shapes |= {f"{at}.self_attn.q_norm.weight": (q,), f"{at}.self_attn.k_norm.weight": (kv,)}
        if kind == "gpt_oss":
            shapes |= {f"{at}.self_attn.{part}_proj.bias": (rows,) for part, rows in
                       (("q", q), ("k", kv), ("v", kv), ("o", d))}  # fmt: skip
            shapes |= _gpt_oss_shapes(c, at)
        elif kind == "qwen3_moe":
            inner = c["moe_intermediate_size"]
            shapes[f"{at}.mlp.gate.weight"] = (c["num_experts"], d)
            for expert in range(c["num_experts"]):
                for part, shape in (("gate", (inner, d)), ("up", (inner, d)), ("down", (d, inner))):
                    shapes[f"{at}.mlp.experts.{expert}.{part}_proj.weight"] = shape
        elif kind == "mixtral":
            shapes[f"{at}.block_sparse_moe.gate.weight"] = (c["num_local_experts"], d)
            for expert in range(c["num_local_experts"]):
                for part, shape in (("w1", (f, d)), ("w3", (f, d)), ("w2", (d, f))):
                    shapes[f"{at}.block_sparse_moe.experts.{expert}.{part}.weight"] = shape
        else:
            if kind != "phi3":
                shapes |= {f"{at}.mlp.{part}_proj.weight": (f, d) for part in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (d, f)
    return shapes


def _gpt_oss_shapes(c: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    d, f, count = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}.self_attn.sinks": (c["num_attention_heads"],),
        f"{at}.mlp.router.weight": (count, d), f"{at}.mlp.router.bias": (count,),
        f"{at}.mlp.experts.gate_up_proj_bias": (count, 2 * f), f"{at}.mlp.experts.down_proj_bias": (count, d),
    }  # fmt: skip
    for part, out, inner in (("gate_up", 2 * f, d), ("down", d, f)):
        if "quantization_config" in c:
            shapes[f"{at}.mlp.experts.{part}_proj_blocks"] = (count, out, inner // 32, 16)
            shapes[f"{at}.mlp.experts.{part}_proj_scales"] = (count, out, inner // 32)
        else:
            shapes[f"{at}.mlp.experts.{part}_proj"] = (count, inner, out)
    return shapes


def weights(name: str, **changes: Any) -> dict[str, np.ndarray]:
    """The tensors of a case, float32: whole multiples of 1/256, so that every reader holds the same numbers; MXFP4's as
    bytes."""
    c = config(name, **changes)
    result, centre = {}, 0.0 if c["model_type"].startswith("gemma") else 1.0
    for tensor, shape in _shapes(c).items():
        rng = np.random.default_rng(zlib.crc32(f"{name} {tensor}".encode()))
        if tensor.endswith(("_blocks", "_scales")):  # of numbers about as large as the others
            low, high = (0, 256) if tensor.endswith("blocks") else (122, 125)
            result[tensor] = rng.integers(low, high, shape).astype(np.uint8)
            continue
        size = 0.25 if len(shape) == 1 or tensor.endswith("bias") else 1.5 / np.sqrt(shape[-1])
        if ".gate.weight" in tensor or ".router." in tensor:
            size *= 4  # routers that are sure of their choice, in any precision
        values = rng.standard_normal(shape) * size + (centre if tensor.endswith("norm.weight") else 0)
        if tensor.endswith("sinks"):
            values = values * 8  # beside scores, some larger and some smaller than these
        result[tensor] = (np.rint(values * 256) / 256).astype(np.float32)
    return result


def write_checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    """The case as a Hugging Face folder, with the vocabulary of another golden; ``changes``: of its config.json."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name, **changes)))
    save_file(weights(name, **changes), folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copy(GOLDENS / "convert" / "hf-qwen2" / file, folder / file)
    return folder


def prompts() -> list[list[int]]:
    """Token ids: a prompt longer than the windows, and one short one."""
    rng = np.random.default_rng(11)
    return [rng.integers(0, V, length).tolist() for length in (75, 9)]
