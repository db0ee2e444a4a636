"""The openai package on slimrt: a tool is called, its result goes back, and the answer comes as a stream."""

import json
import os

from openai import OpenAI

url = os.environ.get("SLIMRT_URL", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SLIMRT_API_KEY", "none"))
model = client.models.list().data[0].id


def weather(city: str, unit: str = "c") -> str:
    """What a real program would look up."""
    return f"Rain in {city}, {7 if unit == 'c' else 45} degrees."


tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["c", "f"]}},
                "required": ["city"],
            },
        },
    }
]
messages = [{"role": "user", "content": "Do I need an umbrella in Oslo?"}]
choice = {"type": "function", "function": {"name": "weather"}}  # left out, the model decides
answer = client.chat.completions.create(
    model=model, messages=messages, tools=tools, tool_choice=choice, max_tokens=100, temperature=0
)
message = answer.choices[0].message
messages.append(message)
for call in message.tool_calls:
    found = weather(**json.loads(call.function.arguments))
    print(f"call: {call.function.name}({call.function.arguments}) -> {found}")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": found})

print("answer: ", end="")
for chunk in client.chat.completions.create(
    model=model, messages=messages, tools=tools, tool_choice="none", max_tokens=40, temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
