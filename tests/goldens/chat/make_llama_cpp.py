"""What llama.cpp's built-in chat formats write, to compare the built-in templates with.

Made with llama-cpp-python 0.3.36 (its own llama.cpp build):

    python tests/goldens/chat/make_llama_cpp.py > tests/goldens/chat/llama_cpp.json
"""

from __future__ import annotations

import ctypes
import json

import llama_cpp
from llama_cpp import llama_chat_format

NAMES = {
    "chatml": "chatml", "llama3": "llama3", "mistral": "mistral-v3", "zephyr": "zephyr", "gemma": "gemma",
    "openchat": "openchat",
}  # fmt: skip
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be terse."), ("user", "Où?\nThere & here")],
    [("system", "Be terse."), ("user", "One"), ("assistant", "Two"), ("user", "Three")],
]


def apply(name: str, conversation: list[tuple[str, str]]) -> str:
    chat = (llama_cpp.llama_chat_message * len(conversation))(
        *[llama_cpp.llama_chat_message(role.encode(), content.encode()) for role, content in conversation]
    )
    buffer = ctypes.create_string_buffer(4096)
    length = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(conversation), True, buffer, len(buffer))
    return buffer.raw[:length].decode()


def qwen(conversation: list[tuple[str, str]]) -> str:
    """As llama-cpp-python's own ``chat_format`` of this name has it, which llama.cpp lacks."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    return str(llama_chat_format.format_qwen(messages).prompt)


def main() -> None:
    results = {
        ours: [{"messages": talk, "text": apply(theirs, talk)} for talk in CONVERSATIONS]
        for ours, theirs in NAMES.items()
    }
    results["qwen"] = [{"messages": talk, "text": qwen(talk)} for talk in CONVERSATIONS]
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "formats": results}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
