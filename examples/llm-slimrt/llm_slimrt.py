"""slimrt as a model of the llm command line."""

from collections.abc import Iterator
from functools import lru_cache

import llm
from pydantic import Field

import slimrt


@llm.hookimpl
def register_models(register):
    register(Slimrt())


@lru_cache(maxsize=1)  # a second model takes the place of the first
def _loaded(file: str | None, ctx: int | None) -> slimrt.LLM:
    return slimrt.load(file, ctx=ctx)


class Slimrt(llm.Model):
    """Reads the prompt and what ``llm`` puts before it (system prompt, files, the conversation) with pruning."""

    model_id = "slimrt"
    can_stream = True

    class Options(llm.Options):
        file: str | None = Field(None, description="GGUF file or hf:owner/repo/file.gguf; none: the default model")
        ctx: int | None = Field(None, description="Most tokens of a conversation")
        prune: str | None = Field(None, description="auto, fast, off or a plan's file")
        max_tokens: int = Field(512, description="Most tokens of an answer")
        temperature: float = Field(0.0, description="0: the likeliest token")
        top_p: float = Field(1.0, description="Draw from the likeliest tokens with this probability in sum")
        seed: int | None = Field(None, description="The same seed gives the same text")

    def execute(self, prompt, stream, response, conversation) -> Iterator[str]:
        options = prompt.options
        try:
            model = _loaded(options.file, options.ctx)
            answer = model.chat(
                _messages(prompt, conversation), stream=True, prune=options.prune, max_tokens=options.max_tokens,
                temperature=options.temperature, top_p=options.top_p, seed=options.seed,
            )  # fmt: skip
            yield from answer
        except slimrt.SlimrtError as error:
            raise llm.ModelError(str(error)) from None
        usage, timings = answer.completion.usage, answer.completion.timings
        response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens)
        response.response_json = {
            "finish_reason": answer.completion.finish_reason, "ttft_s": timings.ttft_s,
            "reused_tokens": timings.reused_tokens,
        }  # fmt: skip


def _messages(prompt, conversation) -> list[dict[str, str]]:
    """The conversation so far and the new prompt, as chat messages."""
    turns = [(old.prompt, old.text()) for old in conversation.responses] if conversation else []
    messages, system = [], None
    for asked, answered in [*turns, (prompt, None)]:
        if asked.system and asked.system != system:  # llm repeats it with every prompt
            system = asked.system
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": asked.prompt})
        if answered is not None:
            messages.append({"role": "assistant", "content": answered})
    return messages
