"""Weights: the GGUF file, packed tensors to float32, and layers that are brought to a card as they are needed."""
