"""The openai package on slimrt: chat, stream, log-probabilities, embeddings, responses."""

import os

from openai import OpenAI

url = os.environ.get("SLIMRT_URL", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SLIMRT_API_KEY", "none"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Name three colours."}]

answer = client.chat.completions.create(model=model, messages=messages, max_tokens=30, temperature=0)
print("chat:", answer.choices[0].message.content)

stream = client.chat.completions.create(
    model=model, messages=messages, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
)
print("stream: ", end="")
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f" ({chunk.usage.completion_tokens} tokens)")

likely = client.chat.completions.create(
    model=model, messages=messages, max_tokens=1, temperature=0, logprobs=True, top_logprobs=3
)
print("likely:", [(one.token, round(one.logprob, 2)) for one in likely.choices[0].logprobs.content[0].top_logprobs])

response = client.responses.create(
    model=model, instructions="Be brief.", input="Say hello.", max_output_tokens=20, temperature=0
)
print("responses:", response.output_text)

vectors = client.embeddings.create(model=model, input=["a red apple", "a green apple", "tax law"]).data
first, second, third = (vector.embedding for vector in vectors)
for name, other in (("apple and apple", second), ("apple and law", third)):
    print(f"{name}: {sum(a * b for a, b in zip(first, other, strict=True)):.3f}")
