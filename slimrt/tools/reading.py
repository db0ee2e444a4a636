"""Messages and tools -> what a model reads, by the chat template that it has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # what a plain completion does not need is imported where it is
    from slimrt.text.chat_template import ChatTemplate
    from slimrt.tools.calling import Calling
    from slimrt.tools.messages import ToolForm

__all__ = ["MessageReader"]

log = logging.getLogger(__name__)


class MessageReader:
    """The chat template of a model, read when it is first needed. ``given``: a template, or the name of a built-in
    one, in place of the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, given: str | None = None) -> None:
        self._tokenizer, self._given = tokenizer, given
        self._template: ChatTemplate | None = None
        self._tool_form: ToolForm | None = None

    @property
    def has_template(self) -> bool:
        """Whether there is a template."""
        return bool(self._given or self._tokenizer.chat_template)

    @property
    def template(self) -> ChatTemplate:
        """The template. Raises SettingError if there is none."""
        if self._template is None:
            from slimrt.text.chat_template import ChatTemplate  # jinja2 takes a while to import

            self._template = ChatTemplate.from_tokenizer(self._tokenizer, self._given)
        return self._template

    @property
    def tool_form(self) -> ToolForm:
        """How the template has tools and calls."""
        if self._tool_form is None:
            from slimrt.tools.messages import ToolForm

            self._tool_form = form = ToolForm.of(self.template)
            log.info(
                "tools: calls in the form %s%s", form.format.name,
                "" if form.native else ", asked for in words: the chat template has no place for tools or its form is "
                "not known",
            )  # fmt: skip
        return self._tool_form

    def calling(self, tools: Any, tool_choice: Any, parallel: bool | None) -> Calling | None:
        """See ``LLM.calling``."""
        if not tools and tool_choice in (None, "none", "auto"):
            return None
        from slimrt.tools.calling import Calling

        return Calling.of(self.tool_form, self._tokenizer, tools, tool_choice, parallel)

    def tokens(self, messages: Any, calling: Calling | None) -> list[int]:
        """See ``LLM.chat_tokens``."""
        from slimrt.tools.messages import has_calls

        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        if calling is None and not (listed and has_calls(messages)):
            return self.template.tokens(messages, self._tokenizer)
        tools = () if calling is None else calling.listed
        return self.tool_form.prompt(self.template, self._tokenizer, messages, tools)
