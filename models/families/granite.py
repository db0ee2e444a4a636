"""IBM Granite 3: LLaMA with multipliers of the embedding, the residual connections, the attention and the logits."""

from slimrt.models.architecture import Architecture

GRANITE = Architecture(
    "granite",
    checkpoints=("GraniteForCausalLM",),
    interleaved=True,
    divides_logits=True,
    reads=frozenset({"query scale", "embedding scale", "residual scale", "logit scale"}),
    copied={
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
    defaults={"logits_scaling": 1.0},
)
