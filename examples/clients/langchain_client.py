"""LangChain on slimrt: a chain of prompt, model and parser; streamed, in a batch, asynchronous."""

import asyncio
import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

url = os.environ.get("SLIMRT_URL", "http://127.0.0.1:8080")
model = ChatOpenAI(
    base_url=f"{url}/v1", api_key=os.environ.get("SLIMRT_API_KEY", "none"), model="slimrt", temperature=0, max_tokens=20
)
prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "Name a {thing}.")])
chain = prompt | model | StrOutputParser()

print("stream: ", end="")
for piece in chain.stream({"thing": "colour"}):
    print(piece, end="", flush=True)
print("\nbatch:", chain.batch([{"thing": "river"}, {"thing": "city"}]))
print("async:", asyncio.run(chain.ainvoke({"thing": "tree"})))
