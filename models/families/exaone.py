"""LG EXAONE 3 and 3.5: LLaMA under other names, in the half-split layout."""

from slimrt.models.architecture import Architecture

EXAONE = Architecture(
    "exaone",
    checkpoints=("ExaoneForCausalLM",),
    config_keys={
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    eps=1e-5,
)
