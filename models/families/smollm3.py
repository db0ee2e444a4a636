"""SmolLM3: LLaMA, but every fourth layer is not turned by RoPE (NoPE, arXiv 2501.18795)."""

from slimrt.models.architecture import Architecture

SMOLLM3 = Architecture("smollm3", checkpoints=("SmolLM3ForCausalLM",), interleaved=True, turned=4)
