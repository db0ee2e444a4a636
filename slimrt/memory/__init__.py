"""What a model and its context take of memory, and the largest context that fits."""
