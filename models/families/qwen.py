"""Qwen2 and 2.5 (biases of Q, K and V), Qwen3 (norms of single heads instead), its mixtures of experts."""

from slimrt.models.architecture import Architecture

QWEN2 = Architecture("qwen2", checkpoints=("Qwen2ForCausalLM",), qkv_bias=True)
QWEN3 = Architecture("qwen3", checkpoints=("Qwen3ForCausalLM",), qk_norm="head")
QWEN3MOE = Architecture("qwen3moe", checkpoints=("Qwen3MoeForCausalLM",), qk_norm="head", reads=frozenset({"experts"}))
