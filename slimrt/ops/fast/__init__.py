"""The fast CPU backend: kernels that Numba compiles for the processor at hand.

Read in this order:

- ``features``: what the processor can do, asked before anything is emitted; every kernel is made for a set of features,
  and lesser sets than the processor's own can be given: so lesser processors are tested.
- ``vectors``, ``lanes``, ``bfloat``: the words that kernels are written in, each beside the NumPy line that means the
  same.
- ``kernels``: from a Python function to an address, cached on disk. A kernel is ``def k(item, thread, args)``, three
  int64: which part of the work, which thread's scratch, and the address of its arguments, themselves int64 words
  (``argument(args, i)``) or float64 (``argument_float``). It is made by a cached factory, ``def k_kernel(features)``,
  and everything that the factory's closure holds is in the key that it gives to ``compile_kernel``.
- ``team``: the threads that run programs, lists of jobs of so many items. A job ends when its items are done; nobody
  waits for a thread that has not begun.
- Prefill: ``products`` (blocks of rows times panels: tiles, AVX-512, AVX2), ``unpack`` and ``panels`` (from packed rows
  to panels), ``elements`` and ``layer_kernels`` (the row-wise parts of a layer), ``flash`` (attention).
- Decode: ``activations``, ``byte_products`` and ``dots`` (int8 vectors, a dot product for each type of weights),
  ``gemv``, ``attend_few``, ``decode`` (a whole token as one program).
- ``fast_ops``: the operations, as the engine calls them.
"""
