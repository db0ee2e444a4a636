"""LLaMA 1 to 3.3, SmolLM2, TinyLlama; Mistral and Ministral with sliding windows; Mixtral with experts. Mistral Small
3.1 and Ministral 3 (text) are called mistral3: queries grow with their position (as in Llama 4), YaRN has no gain."""

from dataclasses import replace

from slimrt.models.architecture import Architecture

LLAMA = Architecture(
    "llama",
    checkpoints=(
        "LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "MixtralForCausalLM",
    ),
    interleaved=True,
    reads=frozenset({"experts"}),
)  # fmt: skip
MISTRAL3 = replace(
    LLAMA,
    name="mistral3",
    checkpoints=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    reads=frozenset({"growing queries"}),
    copied={"llama_4_scaling_beta": "attention.temperature_scale"},
    eps=1e-5,
)
