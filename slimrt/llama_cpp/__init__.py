"""``Llama``: what code written for ``llama_cpp.Llama`` calls."""
