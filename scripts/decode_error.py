"""How far decode and prefill are from NumPy's float32, of slimrt's compiled kernels and of llama.cpp, on one file.

    python -m scripts.decode_error ours MODEL.gguf FOLDER      slimrt's environment
    python -m scripts.decode_error theirs MODEL.gguf FOLDER    one with llama-cpp-python; prints its figures

The mean KL divergence over three passages of 300 tokens of Python's documentation, each read in one piece and a token
at a time, one thread. ``ours`` leaves NumPy's logits in FOLDER for ``theirs``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

STARTS, TOKENS = (1000, 50_000, 90_000), 300


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(exact || other) over the rows of logits [T, V], in nats."""
    p, q = (_log_softmax(rows.astype(np.float64)) for rows in (exact, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def ours(model: str, folder: Path) -> None:
    """slimrt's figures; what NumPy says goes to ``folder``."""
    import slimrt
    from slimrt.eval.text import load_corpus

    fast, plain = (slimrt.load(model, device=device, threads=1, prune="off").engine for device in ("cpu", "numpy"))
    text = load_corpus(slimrt.load(model, device="numpy").tokenizer).tokens
    kept = {}
    for number, start in enumerate(STARTS):
        ids = text[start : start + TOKENS].tolist()
        exact, read = (e.logits(e.prefill(e.new_context(), ids, wanted=TOKENS)[0]) for e in (plain, fast))
        context = fast.new_context()
        decoded = np.stack([fast.decode_one_token(context, token) for token in ids])
        kept |= {f"ids{number}": np.array(ids), f"exact{number}": exact}
        print(
            f"slimrt, passage {number}: prefill {divergence(exact, read):.2e}, decode {divergence(exact, decoded):.2e}"
        )
    np.savez(folder / "exact.npz", **kept)


def theirs(model: str, folder: Path) -> None:
    """llama.cpp's figures."""
    import llama_cpp

    kept = np.load(folder / "exact.npz")
    llm = llama_cpp.Llama(model, n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for number in range(len(STARTS)):
        ids, exact = kept[f"ids{number}"].tolist(), kept[f"exact{number}"]
        llm.reset()
        llm.eval(ids)
        read = divergence(exact, llm.scores[: len(ids)])
        llm.reset()
        for token in ids:
            llm.eval([token])
        print(
            f"llama.cpp, passage {number}: prefill {read:.2e}, decode {divergence(exact, llm.scores[: len(ids)]):.2e}"
        )


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
