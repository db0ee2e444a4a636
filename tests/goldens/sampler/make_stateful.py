"""DRY, mirostat, dynamic temperature, XTC and top-n-sigma of llama.cpp, for fixed logits, contexts and settings.

Made with llama-cpp-python 0.3.36 (its own llama.cpp build) and NumPy 2.x; DRY looks breakers up in a vocabulary, that
of SmolLM2:

    python tests/goldens/sampler/make_stateful.py smollm2-135m.gguf > tests/goldens/sampler/stateful.json
"""

from __future__ import annotations

import ctypes
import json
import math
import sys

import llama_cpp
import numpy as np

FILTERS: list[dict[str, float]] = [
    {"temperature": 1.0, "dynatemp_range": 0.5},
    {"temperature": 0.6, "dynatemp_range": 1.5, "dynatemp_exponent": 2.0},
    {"temperature": 1.2, "dynatemp_range": 0.4, "dynatemp_exponent": 0.5, "top_k": 12},
    {"temperature": 0.0, "dynatemp_range": 0.8, "top_k": 30},
    {"temperature": 1.0, "dynatemp_range": 0.5, "top_k": 1},
    {"temperature": 1.0, "top_n_sigma": 1.0},
    {"temperature": 1.7, "top_n_sigma": 2.1, "min_p": 0.02},
    {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"temperature": 0.8, "xtc_probability": 1.0, "xtc_threshold": 0.1, "min_p": 0.01},
    {"temperature": 1.3, "xtc_probability": 1.0, "xtc_threshold": 0.3, "top_p": 0.9},
    {
        "temperature": 1.0,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.05,
        "top_n_sigma": 1.5,
        "min_p": 1e-6,
        "dynatemp_range": 0.3,
    },
]
MIROSTATS: list[dict[str, float]] = [
    {"mirostat": version, "mirostat_tau": tau, "mirostat_eta": eta, "temperature": temperature}
    for version in (1, 2)
    for tau, eta, temperature in ((5.0, 0.1, 1.0), (2.0, 0.5, 0.7), (0.2, 1.0, 1.5))
]
DRYS: list[dict[str, object]] = [
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": 400},
    {"dry_multiplier": 2.5, "dry_base": 1.1, "dry_allowed_length": 0, "dry_penalty_last_n": 20},
    {"dry_multiplier": 1.0, "dry_base": 3.0, "dry_allowed_length": 4, "dry_penalty_last_n": 400},
    {"dry_multiplier": 1.0, "dry_penalty_last_n": 400, "dry_sequence_breakers": []},
    {"dry_multiplier": 1.0, "dry_penalty_last_n": 400, "dry_sequence_breakers": ["the", " lazy dog", "\n\n"]},
    {"dry_multiplier": 0.5, "dry_base": 1.0, "dry_penalty_last_n": 400},
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy",
    "User: what is it?\nBot: It is what it is.\nUser: what is it?\nBot: It is what it",
    "a b c c b c y a b c",
    "one two three, one two three, one two three, one two three, one two",
    'He said "never again" and then he said "never again and',
    "no repetition here at all",
    "x" * 300,
]
BREAKERS = ["\n", ":", '"', "*"]


def short(x: float) -> float:
    """Nine digits name a float32 exactly."""
    return float(f"{x:.9g}")


def chain_of(*samplers: object) -> object:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in samplers:
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def array_of(logits: list[float]) -> object:
    data = (llama_cpp.llama_token_data * len(logits))(
        *[llama_cpp.llama_token_data(id, logit, 0.0) for id, logit in enumerate(logits)]
    )
    return llama_cpp.llama_token_data_array(data, len(logits), -1, False)


def probabilities(array: object) -> dict[str, float]:
    entries = [array.data[i] for i in range(array.size)]  # type: ignore[attr-defined]
    return {str(entry.id): short(entry.p) for entry in entries if entry.p > 0}


def filtered(logits: list[float], s: dict[str, float]) -> dict[str, float]:
    chain = chain_of(
        llama_cpp.llama_sampler_init_top_n_sigma(s.get("top_n_sigma", -1.0)),
        llama_cpp.llama_sampler_init_top_k(int(s.get("top_k", 0))),
        llama_cpp.llama_sampler_init_top_p(s.get("top_p", 1.0), 1),
        llama_cpp.llama_sampler_init_min_p(s.get("min_p", 0.0), 1),
        llama_cpp.llama_sampler_init_xtc(s.get("xtc_probability", 0.0), s.get("xtc_threshold", 0.1), 1, 1),
        llama_cpp.llama_sampler_init_temp_ext(
            s["temperature"], s.get("dynatemp_range", 0.0), s.get("dynatemp_exponent", 1.0)
        ),
        llama_cpp.llama_sampler_init_dist(1),
    )
    array = array_of(logits)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    return probabilities(array)


def followed(rows: list[list[float]], s: dict[str, float]) -> list[dict[str, object]]:
    """For each row of logits what stays and which token llama.cpp's generator drew."""
    tau, eta = s["mirostat_tau"], s["mirostat_eta"]
    chain = chain_of(
        llama_cpp.llama_sampler_init_temp(s["temperature"]),
        llama_cpp.llama_sampler_init_mirostat(len(rows[0]), 1, tau, eta, 100)
        if s["mirostat"] == 1
        else llama_cpp.llama_sampler_init_mirostat_v2(1, tau, eta),
    )
    steps = []
    for logits in rows:
        array = array_of(logits)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        kept = probabilities(array)
        steps.append({"kept": len(kept), "drawn": array.data[array.selected].id, "p": array.data[array.selected].p})
    return steps


def repeated(vocab: object, size: int, ids: list[int], s: dict[str, object]) -> dict[str, float]:
    """What is subtracted from which token's logit; null: all of it."""
    texts = [text.encode() for text in s.get("dry_sequence_breakers", BREAKERS)]  # type: ignore[attr-defined]
    sampler = llama_cpp.llama_sampler_init_dry(
        vocab, s["dry_multiplier"], s.get("dry_base", 1.75), s.get("dry_allowed_length", 2),
        s.get("dry_penalty_last_n", 64), (ctypes.c_char_p * len(texts))(*texts), len(texts),
    )  # fmt: skip
    chain = chain_of(sampler)
    for token in ids:
        llama_cpp.llama_sampler_accept(chain, token)
    array = array_of([0.0] * size)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    changed = [(array.data[i].id, -array.data[i].logit) for i in range(array.size) if array.data[i].logit != 0]
    return {str(id): short(by) if math.isfinite(by) else None for id, by in changed}


def main() -> None:
    rng = np.random.default_rng(20261128)
    rows = [[short(x) for x in (rng.standard_normal(150) * spread).astype(np.float32)] for spread in (0.5, 1.5, 4.0)]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_load_model_from_file(sys.argv[1].encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_n_vocab(vocab)
    repetitions = []
    for text in TEXTS:
        raw, room = text.encode(), (ctypes.c_int32 * 1000)()
        ids = list(room[: llama_cpp.llama_tokenize(vocab, raw, len(raw), room, 1000, False, False)])
        results = [{"setting": s, "penalties": repeated(vocab, size, ids, s)} for s in DRYS]
        repetitions.append({"ids": ids, "results": results})
    many = [rows[at % 3] for at in range(12)]
    print(
        json.dumps(
            {
                "llama_cpp_python": llama_cpp.__version__,
                "rows": rows,
                "filters": [[{"setting": s, "kept": filtered(row, s)} for s in FILTERS] for row in rows],
                "mirostat": [{"setting": s, "steps": followed(many, s)} for s in MIROSTATS],
                "dry": repetitions,
            }
        )
    )


if __name__ == "__main__":
    main()
