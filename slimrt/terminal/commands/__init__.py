"""The commands of ``slimrt``, declared: options -> frozen settings -> one call. None imports NumPy before it runs."""
