"""Which prompt tokens go on: the plan, the scores of blocks, the choice, and the windows of the layers before.

Pure functions of NumPy arrays, below the operations: the NumPy backend computes with them, other backends are tested
against them.
"""
