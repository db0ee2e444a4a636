"""LlamaIndex on slimrt: a model behind an OpenAI-like address; chat and stream."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url = os.environ.get("SLIMRT_URL", "http://127.0.0.1:8080")
model = OpenAILike(
    api_base=f"{url}/v1", api_key=os.environ.get("SLIMRT_API_KEY", "none"), model="slimrt", is_chat_model=True,
    context_window=8192, max_tokens=20, temperature=0,
)  # fmt: skip
messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Name a colour.")]

print("chat:", model.chat(messages).message.content)
print("stream: ", end="")
for chunk in model.stream_chat(messages):
    print(chunk.delta or "", end="", flush=True)
print()
