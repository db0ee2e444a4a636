"""Which tokens llama.cpp's samplers keep, and with what probabilities, for fixed logits and settings.

Made with llama-cpp-python 0.3.36 (its own llama.cpp build), NumPy 2.x:

    python tests/goldens/sampler/make_llama_cpp.py > tests/goldens/sampler/llama_cpp.json
"""

from __future__ import annotations

import ctypes
import json

import llama_cpp
import numpy as np

SETTINGS: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "typical_p": 0.2},
    {"temperature": 1.0, "typical_p": 0.7},
    {"temperature": 1.5, "typical_p": 0.9, "top_k": 50},
    {"temperature": 0.9, "typical_p": 0.8, "top_k": 60, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 1.0, "repeat_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": 0.6},
    {"temperature": 1.0, "frequency_penalty": -0.6, "top_p": 0.8},
    {"temperature": 1.0, "repeat_penalty": 0.8, "presence_penalty": 0.2, "frequency_penalty": 0.3, "penalty_last_n": 7},
    {"temperature": 1.0, "repeat_penalty": 1.5, "penalty_last_n": 0},
    {"temperature": 1.0, "repeat_penalty": 1.5, "presence_penalty": 0.5, "penalty_last_n": 1000, "top_k": 20},
]


def short(x: float) -> float:
    """Nine digits name a float32 exactly."""
    return float(f"{x:.9g}")


def kept(logits: list[float], context: list[int], setting: dict[str, float]) -> dict[str, float]:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    add = lambda sampler: llama_cpp.llama_sampler_chain_add(chain, sampler)  # noqa: E731
    add(
        llama_cpp.llama_sampler_init_penalties(
            len(logits),
            int(setting.get("penalty_last_n", 64)),
            setting.get("repeat_penalty", 1.0),
            setting.get("frequency_penalty", 0.0),
            setting.get("presence_penalty", 0.0),
        )
    )
    add(llama_cpp.llama_sampler_init_top_k(int(setting.get("top_k", 0))))
    add(llama_cpp.llama_sampler_init_typical(setting.get("typical_p", 1.0), 1))
    add(llama_cpp.llama_sampler_init_top_p(setting.get("top_p", 1.0), 1))
    add(llama_cpp.llama_sampler_init_min_p(setting.get("min_p", 0.0), 1))
    add(llama_cpp.llama_sampler_init_temp(setting["temperature"]))
    add(llama_cpp.llama_sampler_init_dist(1))
    for token in context:
        llama_cpp.llama_sampler_accept(chain, token)
    data = (llama_cpp.llama_token_data * len(logits))(
        *[llama_cpp.llama_token_data(id, logit, 0.0) for id, logit in enumerate(logits)]
    )
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    result = {str(array.data[i].id): short(array.data[i].p) for i in range(array.size)}
    llama_cpp.llama_sampler_free(chain)
    return result


def main() -> None:
    rng = np.random.default_rng(20250101)
    cases = []
    for size, spread in ((150, 1.0), (150, 4.0)):
        logits = [short(x) for x in (rng.standard_normal(size) * spread).astype(np.float32)]
        context = [int(id) for id in rng.integers(0, 40, 90)] + [int(id) for id in np.argsort(logits)[-3:]]
        results = [{"setting": setting, "kept": kept(logits, context, setting)} for setting in SETTINGS]
        cases.append({"logits": logits, "context": context, "results": results})
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
