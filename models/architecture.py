"""What an architecture is made of, in words: from them follow loading, conversion, the memory plan and every backend.

A family is one file in ``families/``: an ``Architecture`` that says in what its layers differ from LLaMA's. What can
differ from file to file (sizes, bases, scales, windows, experts) is read from the metadata by ``read_config``, under
the keys that llama.cpp writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Activation", "Architecture", "Stated"]

Stated = Literal["attention cap", "logit cap", "query scale", "embedding scale", "residual scale", "logit scale",
                   "experts", "growing queries"]  # fmt: skip
Activation = Literal["silu", "gelu", "clamped"]


@dataclass(frozen=True)
class Architecture:
    """The layers of one family; every default is LLaMA's.

    name            ``general.architecture``
    checkpoints     Transformers' classes whose checkpoints are converted to it
    interleaved     RoPE turns dimensions (0, 1), (2, 3), ... of a head, not (0, Dh/2), (1, Dh/2 + 1), ...
    norms           where norms of width D stand: before attention and feed-forward, after them, both
    centred         a norm subtracts the mean first (LayerNorm without bias)
    parallel        attention and feed-forward read the same norm of the layer's input, and both are added to it
    qk_norm         queries and keys are normed before they are turned: each head alone, or the whole row
    qkv_bias        biases of Q, K and V that a converted checkpoint has (a GGUF file may have any)
    activation      of the gate: SiLU, GELU in its tanh form, or gpt-oss's clamped one (``NumpyOps.clamped``)
    sinks           each query head has a learned logit that takes its part in the softmax and has no value
    ffn_norm        the name of the norm before the feed-forward in files
    expert_biases   of the router and of the experts' matrices
    whole_ramp      YaRN's ramp begins and ends at whole dimensions, where the file does not say
    see_all_every   of so many layers the last sees everything, where the file states a window (0: none does)
    window          where the file states none
    no_window       a stated window of 0 means that there is none
    turned          which layers RoPE turns: all, those with a window, all but every n-th
    local_base      layers with a window turn by this base, without scaling (None: as all others)
    embedding_scale the embedding is multiplied with sqrt(D)
    divides_logits  the file's logit scale divides
    wide_at         of models with so many layers queries are scaled by 1 / sqrt(D / H) instead of 1 / sqrt(Dh)
    reads           which optional metadata mean something; a file that states any other cannot be run
    always_tied     the output matrix is the embedding
    fused           a converted file holds Q, K, V as ``attn_qkv`` and gate, up as ``ffn_up``; read are both forms

    For conversion: ``half_split`` says that checkpoints turn half-split pairs whatever GGUF does, ``norm_shift`` is
    added to the weights of norms, ``config_keys`` has other names of config.json (ours -> theirs), ``copied`` what is
    copied into the metadata (theirs -> ours), ``defaults`` what config.json leaves out, ``eps`` the default of the
    norm's epsilon. ``grouped_qkv``: Q, K and V lie interleaved by KV head in checkpoints; ``turned_experts``: experts'
    matrices lie there as [in, out], rows of gate and up in turns. ``fixed``: what else config.json may not state (their
    key -> the only value).
    """

    name: str
    checkpoints: tuple[str, ...] = ()
    interleaved: bool = False
    norms: Literal["before", "after", "both"] = "before"
    centred: bool = False
    parallel: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    activation: Activation = "silu"
    sinks: bool = False
    ffn_norm: str = "ffn_norm"
    expert_biases: bool = False
    whole_ramp: bool = True
    see_all_every: int = 0
    window: int = 0
    no_window: bool = False
    turned: Literal["all", "windowed"] | int = "all"
    local_base: float | None = None
    embedding_scale: bool = False
    divides_logits: bool = False
    wide_at: int = 0
    reads: frozenset[Stated] = frozenset()
    always_tied: bool = False
    fused: bool = False
    half_split: bool = True
    norm_shift: float = 0.0
    config_keys: Mapping[str, str] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    eps: float = 1e-6
    grouped_qkv: bool = False
    turned_experts: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def permuted(self) -> bool:
        """Whether conversion reorders the rows of Q and K."""
        return self.interleaved and self.half_split

    def layer_shapes(
        self, d_model: int, q: int, kv: int, d_ff: int, head_dim: int, experts: tuple[int, int] | None
    ) -> dict[str, tuple[int, ...]]:
        """Names (behind ``blk.N.``) and shapes of a layer's tensors in a converted file, biases aside, in file order.
        ``q``, ``kv``: widths of all heads; ``experts``: how many, and the width of each."""
        norm, shapes = (d_model,), dict[str, tuple[int, ...]]()
        if self.norms != "after":
            shapes["attn_norm"] = norm
            if not self.parallel:
                shapes[self.ffn_norm] = norm
        if self.norms != "before":
            shapes |= {"post_attention_norm": norm, "post_ffw_norm": norm}
        if self.qk_norm != "none":
            whole = self.qk_norm == "full"
            shapes |= {"attn_q_norm": (q if whole else head_dim,), "attn_k_norm": (kv if whole else head_dim,)}
        if self.fused:
            shapes["attn_qkv"] = (q + 2 * kv, d_model)
        else:
            shapes |= {"attn_q": (q, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model)}
        shapes["attn_output"] = (d_model, q)
        if self.sinks:
            shapes["attn_sinks"] = (q // head_dim,)
        if experts is not None:
            count, width = experts
            shapes |= {
                "ffn_gate_inp": (count, d_model),
                "ffn_gate_exps": (count, width, d_model),
                "ffn_up_exps": (count, width, d_model),
                "ffn_down_exps": (count, d_model, width),
            }
        elif self.fused:
            shapes |= {"ffn_up": (2 * d_ff, d_model), "ffn_down": (d_model, d_ff)}
        else:
            shapes |= {"ffn_gate": (d_ff, d_model), "ffn_up": (d_ff, d_model), "ffn_down": (d_model, d_ff)}
        return shapes

    @property
    def eps_key(self) -> str:
        """The metadata key of the norms' epsilon, behind the architecture's name."""
        return "attention.layer_norm_epsilon" if self.centred else "attention.layer_norm_rms_epsilon"

    def windowed(self, layer: int) -> bool:
        """Whether ``layer`` has a window, where the file states one and no pattern."""
        every = self.see_all_every
        return not every or layer % every < every - 1

    def turns(self, layer: int, windowed: bool) -> int:
        """By what ``layer`` is turned, as ``ModelConfig.turns`` says it."""
        if self.turned == "windowed" and not windowed:
            return -1
        if isinstance(self.turned, int) and (layer + 1) % self.turned == 0:
            return -1
        return 1 if windowed and self.local_base is not None else 0
