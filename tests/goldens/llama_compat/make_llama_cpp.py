"""What ``llama_cpp.Llama`` takes and answers on the default model: signatures, metadata, tokens, completions.

Made with llama-cpp-python 0.3.36 (its own llama.cpp build):

    python tests/goldens/llama_compat/make_llama_cpp.py SmolLM2-135M-Instruct.Q4_1.gguf \
        > tests/goldens/llama_compat/llama_cpp.json
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import llama_cpp

METHODS = [
    "__init__", "__call__", "create_completion", "create_chat_completion", "generate", "sample", "eval", "reset",
    "tokenize", "detokenize", "n_ctx", "n_vocab", "n_embd", "token_bos", "token_eos", "token_nl", "tokenizer",
    "set_seed", "set_cache", "save_state", "load_state", "close", "from_pretrained", "logits_to_logprobs",
    "longest_token_prefix",
]  # fmt: skip
FRANCE, COUNT, WORDS = "The capital of France is", "1, 2, 3, 4, 5,", "one two three one two three one two three"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
GREEDY = {"temperature": 0.0}
# (method, arguments, whether the text is far from any rounding matter)
CALLS: list[tuple[str, dict[str, Any], bool]] = [
    ("create_completion", {"prompt": FRANCE, "max_tokens": 3, **GREEDY}, True),
    ("__call__", {"prompt": COUNT, "max_tokens": 12, "top_k": 1}, True),
    ("create_completion", {"prompt": COUNT, "max_tokens": 12, "stop": ["8"], **GREEDY}, True),
    ("create_completion", {"prompt": COUNT, "max_tokens": 12, "stop": " 7, 8", "echo": True, **GREEDY}, True),
    ("create_completion", {"prompt": WORDS, "max_tokens": 12, "repeat_penalty": 1.2, **GREEDY}, True),
    ("create_completion", {"prompt": "A B C D", "max_tokens": 12, "repeat_penalty": 1.3, **GREEDY}, True),
    ("create_completion", {"prompt": FRANCE, "max_tokens": 3, "logprobs": 2, **GREEDY}, True),
    ("create_completion", {"prompt": [504, 3575, 282, 4649, 314], "max_tokens": 2, "model": "m", **GREEDY}, True),
    ("create_completion", {"prompt": COUNT, "max_tokens": 5, "stream": True, **GREEDY}, True),
    ("create_completion", {"prompt": COUNT, "max_tokens": 5, "stream": True, "stop": ["7"], **GREEDY}, True),
    ("create_completion", {"prompt": FRANCE, "max_tokens": 3, "stream": True, "logprobs": 1, **GREEDY}, True),
    ("create_chat_completion", {"messages": CHAT, "max_tokens": 4, **GREEDY}, False),
    (
        "create_chat_completion",
        {"messages": CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2, **GREEDY},
        False,
    ),
    ("create_chat_completion", {"messages": CHAT, "max_tokens": 3, "stream": True, **GREEDY}, False),
    (
        "create_chat_completion",
        {"messages": CHAT, "max_tokens": 3, "stream": True, "logprobs": True, "top_logprobs": 2, **GREEDY},
        False,
    ),
]
TEXTS = ["", "Hello world", " two  spaces\n\n", "<|im_start|>user\nä図😀<|im_end|>", "x" * 50, "\n"]


def signature(method: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(llama_cpp.Llama, method)).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def main(path: str) -> None:
    llama = llama_cpp.Llama(path, n_ctx=256, logits_all=True, verbose=False)
    calls = []
    for method, arguments, robust in CALLS:
        answer = getattr(llama, method)(**arguments)
        answer = list(answer) if arguments.get("stream") else answer
        calls.append({"method": method, "arguments": arguments, "robust": robust, "answer": answer})
    tokens = []
    for text in TEXTS:
        for special in (False, True):
            ids = llama.tokenize(text.encode(), special=special)
            plain, shown = llama.detokenize(ids).decode(), llama.detokenize(ids, special=True).decode()
            tokens.append({"text": text, "special": special, "ids": ids, "plain": plain, "shown": shown})
    numbers = ("n_ctx", "n_vocab", "n_embd", "token_bos", "token_eos", "token_nl")
    golden = {
        "llama_cpp_python": llama_cpp.__version__,
        "signatures": {method: signature(method) for method in METHODS},
        "metadata": llama.metadata,
        "numbers": {name: getattr(llama, name)() for name in numbers},
        "tokens": tokens,
        "calls": calls,
    }
    print(json.dumps(golden, ensure_ascii=False, indent=1, default=float).replace(path, "MODEL"))


if __name__ == "__main__":
    main(sys.argv[1])
