"""What the Python interface is asked with: prompts, messages, and the keyword arguments of each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimrt.context import Progress
from slimrt.load_options import Plan
from slimrt.request import GenerateOptions
from slimrt.session import Session

__all__ = ["ChatOptions", "Messages", "Prompt", "StreamOptions", "Tools"]

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class AskOptions(GenerateOptions, total=False):
    """The keyword arguments that ``LLM.chat`` and ``LLM.generate`` share."""

    prune: Plan | None
    session: Session | None
    progress: Progress | None


class StreamOptions(AskOptions, total=False):
    """The keyword arguments of ``LLM.generate``."""

    special: bool


class ChatOptions(AskOptions, total=False):
    """The keyword arguments of ``LLM.chat``."""

    tools: Tools | None
    tool_choice: Any
    parallel_tool_calls: bool | None
