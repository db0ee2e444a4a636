"""InternLM 2 and 2.5: LLaMA; checkpoints hold Q, K and V interleaved by KV head, GGUF files apart."""

from slimrt.models.architecture import Architecture

INTERNLM2 = Architecture("internlm2", checkpoints=("InternLM2ForCausalLM",), interleaved=True, grouped_qkv=True)
