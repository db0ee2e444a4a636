"""Families' templates with tools, documents and thinking, as Transformers renders them; templates by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slimrt.convert import convert_checkpoint
from slimrt.errors import ModelFileError, SettingError
from slimrt.text.chat_template import ChatTemplate
from slimrt.text.tokenizer import Tokenizer
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import checkpoint, edit_json

GOLDENS = Path(__file__).parents[1] / "goldens/chat"
GOLDEN = json.loads((GOLDENS / "transformers_tools.json").read_text())
TALK = [{"role": "user", "content": "Hello"}]
TOOLS = GOLDEN["cases"][4]["extra"]["tools"]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_families_render_as_in_transformers(name: str) -> None:
    template = ChatTemplate(GOLDEN["day"] + (GOLDENS / f"{name}.jinja").read_text(), GOLDEN["bos"], GOLDEN["eos"])
    expected = iter(GOLDEN["templates"][name])
    for case in GOLDEN["cases"]:
        for prompt in (True, False):
            wanted = next(expected)
            if isinstance(wanted, str):
                with pytest.raises(SettingError, match=re.escape(wanted[:150])):
                    template.render(case["messages"], add_generation_prompt=prompt, **case["extra"])
                continue
            text = template.render(case["messages"], add_generation_prompt=prompt, **case["extra"])
            assert [len(text), hashlib.sha256(text.encode()).hexdigest()[:32]] == wanted, text


def test_keys_without_a_value_are_not_there() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [], "name": None}]
    template = ChatTemplate("{{ messages[0].keys() | list }}")
    assert template.render(messages) == "['role', 'tool_calls']"


def tokenizer(**templates: Any) -> Any:
    stand_in: Any = SimpleNamespace(bos_id=None, eos_id=None)
    stand_in.chat_template = templates.pop("default", None)
    stand_in.named_chat_templates = templates
    return stand_in


def test_the_template_for_tools_serves_where_tools_are_given() -> None:
    model = tokenizer(default="{{ 'plain' }}", tool_use="{{ tools[0].function.name }}", rag="{{ 'documents' }}")
    template = ChatTemplate.from_tokenizer(model)
    assert template.render(TALK) == template.render(TALK, tools=[]) == "plain"
    assert template.render(TALK, tools=TOOLS) == "get_weather"
    assert ChatTemplate.from_tokenizer(model, "rag").render(TALK, tools=TOOLS) == "documents"
    assert ChatTemplate.from_tokenizer(model, "{{ 'mine' }}").render(TALK, tools=TOOLS) == "mine"


def test_a_file_with_named_templates_alone_lists_them() -> None:
    with pytest.raises(
        SettingError, match=r"only templates by name: rag, tool_use; give one .* of rag, tool_use, chat"
    ):
        ChatTemplate.from_tokenizer(tokenizer(rag="{{ 1 }}", tool_use="{{ 2 }}"))


def converted(tmp_path: Path, templates: Any, **files: str) -> Tokenizer:
    folder = Path(shutil.copytree(checkpoint("hf-qwen2"), tmp_path / "checkpoint"))
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    (folder / "chat_template.jinja").unlink()
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    convert_checkpoint(folder, tmp_path / "out.gguf")
    return Tokenizer.from_gguf(GGUFFile(tmp_path / "out.gguf"))


def test_conversion_keeps_templates_by_name(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "{{ 'a' }}"}, {"name": "tool_use", "template": "{{ 'b' }}"}]
    model = converted(tmp_path, listed)
    assert model.chat_template == "{{ 'a' }}" and model.named_chat_templates == {"tool_use": "{{ 'b' }}"}
    template = ChatTemplate.from_tokenizer(model)
    assert (template.render(TALK), template.render(TALK, tools=TOOLS)) == ("a", "b")


def test_files_go_before_the_configuration(tmp_path: Path) -> None:
    model = converted(
        tmp_path,
        "{{ 'old' }}",
        chat_template_jinja="{{ 'new' }}",
        additional_chat_templates__tool_use_jinja="{{ 'tools' }}",
    )
    assert model.chat_template == "{{ 'new' }}" and model.named_chat_templates == {"tool_use": "{{ 'tools' }}"}


def test_the_older_file_for_processors(tmp_path: Path) -> None:
    assert converted(tmp_path, None, chat_template_json='{"chat_template": "{{ 1 }}"}').chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b", "a_b"], "have no names or the same one as GGUF writes them"),
        (["", "b"], "have no names or the same one"),
        ([f"t{number}" for number in range(40)], "40 chat templates; at most 32 are kept"),
    ],
)
def test_names_that_gguf_cannot_tell_apart(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        converted(tmp_path, [{"name": name, "template": "x"} for name in names])
    assert "\n" not in str(caught.value)
