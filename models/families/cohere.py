"""Cohere's Command R and R7B, Aya: attention and feed-forward side by side behind one LayerNorm, scaled logits. R7B
(cohere2) turns only the layers with windows, three of four."""

from dataclasses import replace

from slimrt.models.architecture import Architecture

COMMAND_R = Architecture(
    "command-r",
    checkpoints=("CohereForCausalLM",),
    interleaved=True,
    centred=True,
    parallel=True,
    reads=frozenset({"logit scale"}),
    always_tied=True,
    half_split=False,
    config_keys={"rms_norm_eps": "layer_norm_eps"},
    copied={"logit_scale": "logit_scale"},
    defaults={"logit_scale": 0.0625},
    eps=1e-5,
)
COHERE2 = replace(
    COMMAND_R,
    name="cohere2",
    checkpoints=("Cohere2ForCausalLM",),
    see_all_every=4,
    turned="windowed",
    defaults={"logit_scale": 0.0625, "sliding_window": 4096},
)
