"""The anthropic package on slimrt: messages, stream, counting tokens."""

import os

from anthropic import Anthropic

url = os.environ.get("SLIMRT_URL", "http://127.0.0.1:8080")
client = Anthropic(base_url=url, api_key=os.environ.get("SLIMRT_API_KEY", "none"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Name three colours."}]

answer = client.messages.create(
    model=model, system="Be brief.", messages=messages, max_tokens=30,
    extra_body={"temperature": 0},  # newer versions of the package do not name it
)  # fmt: skip
print("message:", answer.content[0].text, f"({answer.usage.output_tokens} tokens, {answer.stop_reason})")

with client.messages.stream(model=model, messages=messages, max_tokens=30) as stream:
    print("stream: ", end="")
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print()

print("counted:", client.messages.count_tokens(model=model, messages=messages).input_tokens)
