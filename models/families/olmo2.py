"""OLMo 2 and 3: norms behind attention and feed-forward, and over whole rows of queries and keys. OLMo 3 has windows in
three of four layers, whose RoPE is not stretched."""

from slimrt.models.architecture import Architecture

OLMO2 = Architecture(
    "olmo2",
    checkpoints=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    norms="after",
    qk_norm="full",
    see_all_every=4,
    eps=1e-5,
)
