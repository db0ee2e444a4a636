"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: stacked matrices, RoPE on a part of a head, factors for short and long
contexts. Phi-4 states a window of 0, which is none."""

from slimrt.models.architecture import Architecture

PHI3 = Architecture("phi3", checkpoints=("Phi3ForCausalLM",), no_window=True, fused=True, eps=1e-5)
