"""Next-token logits and greedy continuations of the default model, by llama.cpp.

Made with llama-cpp-python 0.3.36 (its own build of llama.cpp) and NumPy 2.4 on x86-64:

    pip install llama-cpp-python==0.3.36
    python tests/goldens/logits/make_logits.py SmolLM2-135M-Instruct.Q4_1.gguf tests/goldens/logits/llama_cpp.npz

Two runs of the same weights: ``f32`` is the file requantised by llama.cpp itself to float32, with float32 keys and
values and no flash attention, which is llama.cpp at its most exact; ``q4_1`` is the file as users run it, where
llama.cpp rounds activations to int8 blocks. How far the two lie apart is what llama.cpp itself calls the same.
Of each logit row every 16th value and the largest 32 are kept.
"""

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n",
    "Überraschend viele Wörter: naïve, façade, 東京, Привет! 🙂 1234567890",
    "It was a bright cold day in April, and the clocks were striking thirteen. The old man closed the heavy door, "
    "shook the rain from his coat, and looked for a long time at the letter on the table. It said that",
]


def rows(llm: llama_cpp.Llama, ids: list[int], greedy: int) -> tuple[np.ndarray, list[int]]:
    llm.reset()
    llm.eval(ids)
    out, tokens = [], []
    for _ in range(greedy):
        row = np.array(
            llm._scores[-1] if llm._logits_all else np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),))
        )
        out.append(row)
        tokens.append(int(row.argmax()))
        llm.eval(tokens[-1:])
    return np.array(out, np.float32), tokens


def main(model: str, target: str) -> None:
    result: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact = str(Path(folder) / "f32.gguf")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        if llama_cpp.llama_model_quantize(model.encode(), exact.encode(), params):
            raise SystemExit("llama.cpp could not requantise the model")
        for name, path, options in (
            ("f32", exact, {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}),
            ("q4_1", model, {}),
        ):
            llm = llama_cpp.Llama(path, n_ctx=512, verbose=False, flash_attn=False, logits_all=True, **options)
            for number, text in enumerate(TEXTS):
                ids = llm.tokenize(text.encode(), add_bos=False, special=True)
                logits, tokens = rows(llm, ids, 64)
                result[f"{number}.ids"] = np.array(ids)
                result[f"{number}.{name}.tokens"] = np.array(tokens)
                top = np.argsort(-logits[0])[:32]
                result[f"{number}.{name}.top"] = top
                result[f"{number}.{name}.top_logits"] = logits[0][top]
                result[f"{number}.{name}.every16"] = logits[0][::16]
                gaps = np.sort(logits, axis=1)
                result[f"{number}.{name}.gaps"] = gaps[:, -1] - gaps[:, -2]
    result["texts"] = np.array(TEXTS)
    np.savez_compressed(target, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
