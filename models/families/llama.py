"""LLaMA 1 to 3.3, SmolLM2, TinyLlama; Mistral and Ministral with sliding windows; Mixtral with experts."""

from slimrt.models.architecture import Architecture

LLAMA = Architecture(
    "llama",
    checkpoints=(
        "LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "MixtralForCausalLM",
    ),
    interleaved=True,
    reads=frozenset({"experts"}),
)  # fmt: skip
