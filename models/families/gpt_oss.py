"""OpenAI's gpt-oss: experts in MXFP4 with a clamped gate and biases everywhere, a learned sink in every head's softmax,
windows in every other layer (arXiv 2508.10925)."""

from slimrt.models.architecture import Architecture

GPT_OSS = Architecture(
    "gpt-oss",
    checkpoints=("GptOssForCausalLM",),
    activation="clamped",
    sinks=True,
    ffn_norm="post_attention_norm",
    expert_biases=True,
    whole_ramp=False,
    see_all_every=2,
    reads=frozenset({"experts"}),
    turned_experts=True,
    defaults={"attention_bias": True, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0},
    fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    eps=1e-5,
)
