"""Chat messages to a prompt, through the Jinja template that comes with a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimrt.errors import SettingError
from slimrt.text.template_process import render_apart

if TYPE_CHECKING:
    from slimrt.text.tokenizer import Tokenizer

__all__ = ["BUILTIN_TEMPLATES", "ChatTemplate", "Written"]

_Change = Callable[[str, bool], str]
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters, which no text has a use for
_MAX_SOURCE = 1 << 18  # the longest known template has 17,000 characters
_REMEDY = "give one with chat_template= (--chat-template), as a Jinja template or a name"

# The published formats of model families, for files that carry no template. Roles other than these pass as they are, or
# are refused where the format has no place for them.
BUILTIN_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # https://huggingface.co/blog/llama2#how-to-prompt-llama-2
    "llama2": (
        "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + message.content | trim + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + message.content | trim + ' [/INST]' }}{% set ns.system = '' %}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('role ' + message.role + '; llama2 knows system, user and assistant') }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = message.content + '\\n\\n' %}"
        "{% elif message.role == 'user' %}{{ '[INST] ' + ns.system + message.content + '[/INST]' }}"
        "{% set ns.system = '' %}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
        "{% else %}{{ raise_exception('role ' + message.role + '; mistral knows system, user and assistant') }}"
        "{% endif %}"
        "{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    # ChatML with a system message where none is given.
    "qwen": (
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Gemma has no system message: it goes before the question.
    "gemma": (
        "{{ bos_token }}"
        "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ns.system = message.content | trim + '\\n\\n' %}"
        "{% elif message.role == 'user' %}"
        "{{ '<start_of_turn>user\\n' + ns.system + message.content | trim + '<end_of_turn>\\n' }}"
        "{% set ns.system = '' %}"
        "{% elif message.role == 'assistant' %}"
        "{{ '<start_of_turn>model\\n' + message.content | trim + '<end_of_turn>\\n' }}"
        "{% else %}{{ raise_exception('role ' + message.role + '; gemma knows system, user and assistant') }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "openchat": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '<|end_of_turn|>' }}"
        "{% else %}{{ 'GPT4 Correct ' + message.role | capitalize + ': ' + message.content + '<|end_of_turn|>' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    ),
}


class Written(str):
    """A message's text put together of what the program writes, in which control tokens count, and of what others
    do."""

    pieces: Sequence[tuple[str, bool]]

    def __new__(cls, pieces: Sequence[tuple[str, bool]]) -> Written:
        """``pieces``: texts, and whether control tokens spelt in them count."""
        made = super().__new__(cls, "".join(text for text, _ in pieces))
        made.pieces = tuple(pieces)
        return made


class ChatTemplate:
    """One model's way to write a conversation down. ``source`` is the template, ``name`` a built-in's or ""."""

    def __init__(self, source: str, bos_text: str = "", eos_text: str = "", *, with_tools: str | None = None) -> None:
        """``source``: a Jinja template, or a name in ``BUILTIN_TEMPLATES``; ``*_text``: the model's BOS and EOS.
        ``with_tools``: the template that takes its place where ``tools`` are given.

        Raises SettingError for an unknown name, a syntax error, or a template longer than 256 KiB.
        """
        self._with_tools = None if with_tools is None else ChatTemplate(with_tools, bos_text, eos_text)
        if not isinstance(source, str) or ("{" not in source and source not in BUILTIN_TEMPLATES):
            raise SettingError(
                f"chat template {_short(source)!r}: neither a Jinja template nor one of {', '.join(BUILTIN_TEMPLATES)}"
            )
        self.name = source if source in BUILTIN_TEMPLATES else ""
        self.source = BUILTIN_TEMPLATES.get(source, source)
        self._variables = {"bos_token": bos_text, "eos_token": eos_text, "tools": None, "documents": None}
        if len(self.source) > _MAX_SOURCE:
            raise SettingError(
                f"the chat template has {len(self.source)} characters, the limit is {_MAX_SOURCE}; {_REMEDY}"
            )
        self._run(None)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
        """The model's own template, or ``source`` in its place: Jinja, or the name of one of the file's further
        templates or of a built-in one. The file's ``tool_use`` serves where tools are given, as in Transformers.

        Raises SettingError where the file has none and none is given, and as the constructor does.
        """
        named, with_tools = tokenizer.named_chat_templates, None
        if source is None:
            source, with_tools = tokenizer.chat_template, named.get("tool_use")
        else:
            source = named.get(source, source)
        if source is None:
            has = f"only templates by name: {_short(', '.join(sorted(named)))}" if named else "no chat template"
            raise SettingError(
                f"the model file has {has}; {_REMEDY} of {', '.join((*sorted(named)[:8], *BUILTIN_TEMPLATES))}, "
                "the one that the model was trained with"
            )

        def text(id: int | None) -> str:
            return "" if id is None else tokenizer.token_text(id)

        return cls(source, text(tokenizer.bos_id), text(tokenizer.eos_id), with_tools=with_tools)

    @property
    def for_tools(self) -> ChatTemplate:
        """The template that serves where tools are given."""
        return self._with_tools or self

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt for ``messages`` ([{"role": "user", "content": "..."}, ...]).

        ``content`` is text, None, or OpenAI's list of text parts, which are joined by line ends. Other keys of a
        message and ``extra`` variables reach the template as they are, but for keys of value None, which it does not
        see. ``add_generation_prompt``: end where the answer begins.

        Raises SettingError for malformed messages, messages that the template refuses (such as an unknown role), a
        template that fails on them, and one that takes absurd time or space.
        """
        if extra.get("tools") and self._with_tools is not None:
            return self._with_tools.render(messages, add_generation_prompt=add_generation_prompt, **extra)
        return self._rendered(messages, lambda text, whole: text, add_generation_prompt, extra)

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True,
        **extra: Any,
    ) -> list[int]:  # fmt: skip
        """The prompt as token ids: control tokens that the template writes count, those in the messages are text.

        A user who writes ``<|im_end|>`` thus ends nothing. Arguments and errors as for ``render``, and TokenizerError.
        """
        if extra.get("tools") and self._with_tools is not None:
            return self._with_tools.tokens(messages, tokenizer, add_generation_prompt=add_generation_prompt, **extra)
        held = [self.source, *filter(None, self._variables.values())]

        def collect(text: str, whole: bool) -> str:
            held.append(text)
            return text

        self._given(messages, extra, collect)
        mark = next((char for char in _MARKS if not any(char in text for text in held)), None)
        if mark is None:
            raise SettingError("messages hold all 32 noncharacters U+FDD0 to U+FDEF; they are no text; leave them out")
        text = self._rendered(
            messages, lambda text, whole: tokenizer.mark_control(text, mark, whole=whole), add_generation_prompt, extra
        )
        begin = tokenizer.token_text(tokenizer.bos_id) if tokenizer.bos_id is not None else ""
        # A template that writes the begin token itself must not get a second one.
        written = bool(begin) and text.startswith(begin)
        return tokenizer.encode(text, special=True, add_bos=False if written else None, literal=mark)

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], change: _Change, add_generation_prompt: bool, extra: dict[str, Any]
    ) -> str:
        given = self._given(messages, extra, change)
        return self._run({**self._variables, **given, "add_generation_prompt": bool(add_generation_prompt)})

    @staticmethod
    def _given(messages: Sequence[Mapping[str, Any]], extra: dict[str, Any], change: _Change) -> dict[str, Any]:
        """What the caller gives to the template, checked, as plain data with every text changed."""
        checked = [_checked(number, message) for number, message in enumerate(_listed(messages))]
        try:
            return _plain(extra, change) | {
                "messages": [
                    {str(key): _plain(value, change, whole=key == "role") for key, value in message.items()}
                    for message in checked
                ]
            }
        except RecursionError:
            raise SettingError("messages are nested too deeply; a message holds texts, lists and dicts") from None

    def _run(self, variables: dict[str, Any] | None) -> str:
        """The text for ``variables``; None only compiles. Raises SettingError."""
        messages = [] if variables is None else variables["messages"]
        size = sum(len(str(value)) for message in messages for value in message.values())
        answer = render_apart(self.source, variables, size)
        if "text" in answer:
            return answer["text"]
        kind, why = answer["problem"], _short(answer["why"])
        raise SettingError(
            {
                "syntax": f"the chat template is broken in line {answer.get('line')}: {why}; {_REMEDY}",
                "compile": f"the chat template does not compile: {why}; {_REMEDY}",
                "refused": f"the chat template refuses these messages: {why}",
                "failed": f"the chat template fails ({why}); check the messages, or {_REMEDY}",
                "stopped": f"the chat template is stopped: {why}; {_REMEDY}",
                "memory": f"the chat template is stopped: it takes more memory than any chat needs; {_REMEDY}",
                "ended": f"the chat template is stopped: {why}; {_REMEDY}",
            }[kind]
        )


def _plain(value: Any, change: _Change, *, whole: bool = False) -> Any:
    """``value`` as JSON knows it, every text in it changed. ``whole``: the template may complete no token behind it."""
    if isinstance(value, Written):
        return "".join(text if counts else change(text, whole) for text, counts in value.pieces)
    if isinstance(value, str):
        return change(str(value), whole)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {change(str(key), True): _plain(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, change) for item in value]
    raise SettingError(
        f"messages hold a value of type {type(value).__name__}; a template takes texts, numbers, lists and dicts"
    )


def _listed(messages: Any) -> Sequence[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise SettingError(
            f"messages of type {type(messages).__name__}: must be a list, as in [{{'role': 'user', 'content': 'Hi'}}]"
        )
    if not messages:
        raise SettingError("messages is empty; at least one is needed, such as {'role': 'user', 'content': 'Hello'}")
    return messages


def _checked(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise SettingError(f"message {number} is {_short(repr(message))}; it must be a dict with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise SettingError(f"message {number} has the role {_short(repr(role))}; it must be a text such as 'user'")
    if "content" not in message and "tool_calls" not in message:
        raise SettingError(f"message {number} has the keys {_short(sorted(map(str, message)))}; 'content' is missing")
    if content is None and role in ("user", "system"):
        raise SettingError(f"message {number} of the {role} has the content None; it must be text")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "\n".join(_part(number, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise SettingError(f"message {number} has content of type {type(content).__name__}; it must be text")
    # Transformers drops them too: templates write "None" or fail where a key is there without a value.
    return {key: value for key, value in {**message, "content": content}.items() if value is not None}


def _part(number: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise SettingError(f"message {number} has a content part of type {_short(repr(kind))}; this model reads text only")


def _short(what: object) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= 200 else text[:200] + "..."
