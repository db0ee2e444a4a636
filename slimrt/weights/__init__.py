"""Weights: the GGUF file, and packed tensors to float32."""
