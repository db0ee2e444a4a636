"""The fast CPU backend: kernels that Numba compiles for the processor at hand.

Read in this order: ``features`` (what the processor can do, asked before anything is emitted), ``vectors`` (the words
that kernels are written in, each beside the NumPy line that means the same), ``kernels`` (from a Python function to an
address, cached on disk), ``team`` (the threads that run them), then the kernels themselves.
"""
