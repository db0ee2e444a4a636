"""Gemma 1 to 3 (text): GELU, a scaled embedding that is the output matrix as well, norms of 1 + w (llama.cpp stores the
sum). Gemma 2 has norms before and behind, windows in every other layer and soft caps; Gemma 3 norms of single heads in
their place, and windows in five of six layers, which are turned by a smaller base."""

from slimrt.models.architecture import Architecture

GEMMA = Architecture(
    "gemma",
    checkpoints=("GemmaForCausalLM",),
    activation="gelu",
    embedding_scale=True,
    always_tied=True,
    norm_shift=1.0,
    defaults={"head_dim": 256},
)
GEMMA2 = Architecture(
    "gemma2",
    checkpoints=("Gemma2ForCausalLM",),
    norms="both",
    activation="gelu",
    see_all_every=2,
    window=4096,
    embedding_scale=True,
    wide_at=46,
    reads=frozenset({"attention cap", "logit cap"}),
    always_tied=True,
    norm_shift=1.0,
    copied={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    defaults={
        "head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
    },
)  # fmt: skip
GEMMA3 = Architecture(
    "gemma3",
    checkpoints=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    norms="both",
    qk_norm="head",
    activation="gelu",
    see_all_every=6,
    local_base=10000.0,
    embedding_scale=True,
    wide_at=62,
    reads=frozenset({"logit cap"}),
    norm_shift=1.0,
    copied={"final_logit_softcapping": "final_logit_softcapping"},
    defaults={
        "head_dim": 256, "sliding_window": 4096, "rope_theta": 1e6, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
)  # fmt: skip
